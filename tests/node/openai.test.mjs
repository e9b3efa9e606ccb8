// The openai package of npm against a live service at OPENAI_BASE_URL: `node --test openai.test.mjs`.
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";

const ai = new OpenAI({ apiKey: "any", maxRetries: 0 });
const model = "smollm2-135m-instruct";
const messages = [{ role: "user", content: "What is the capital of France?" }];
const greedy = { model, messages, temperature: 0, max_tokens: 8 };

test("models", async () => {
  const found = [];
  for await (const each of ai.models.list()) found.push(each.id);
  assert.deepEqual(found, [model]);
  assert.equal((await ai.models.retrieve(model)).object, "model");
});

test("a chat, whole and as a stream, is the same", async () => {
  const whole = await ai.chat.completions.create(greedy);
  assert.match(whole.choices[0].message.content, /Paris/);
  assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + whole.usage.completion_tokens);
  const stream = await ai.chat.completions.create({ ...greedy, stream: true, stream_options: { include_usage: true } });
  let text = "";
  let last;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta.content ?? "";
    last = chunk;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.deepEqual(last.choices, []);
  assert.equal(last.usage.completion_tokens, whole.usage.completion_tokens);
});

test("the package's own reader of streams", async () => {
  const stream = ai.chat.completions.stream(greedy);
  let text = "";
  stream.on("content", (delta) => (text += delta));
  const whole = await stream.finalChatCompletion();
  assert.equal(text, whole.choices[0].message.content);
  assert.ok(["stop", "length"].includes(whole.choices[0].finish_reason));
});

test("completions of several prompts", async () => {
  const asked = { model, prompt: ["One, two,", "A, B,"], n: 2, max_tokens: 3, temperature: 0 };
  const answer = await ai.completions.create(asked);
  assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1, 2, 3]);
  assert.equal(answer.choices[0].text, answer.choices[1].text);
});

test("log-probabilities", async () => {
  const answer = await ai.chat.completions.create({ ...greedy, max_tokens: 3, logprobs: true, top_logprobs: 2 });
  const { content } = answer.choices[0].logprobs;
  assert.equal(content.length, 3);
  for (const token of content) {
    assert.ok(token.logprob <= 0 && token.top_logprobs.length === 2);
    assert.equal(token.top_logprobs[0].token, token.token, "greedy draws the most likely one");
  }
  assert.equal(content.map((token) => token.token).join(""), answer.choices[0].message.content);
});

test("an answer that is held to a JSON schema", async () => {
  const schema = {
    type: "object",
    properties: { city: { type: "string", maxLength: 12 }, population: { type: "integer", maximum: 99 } },
    required: ["city", "population"],
    additionalProperties: false,
  };
  const response_format = { type: "json_schema", json_schema: { name: "city", schema, strict: true } };
  const answer = await ai.chat.completions.create({ ...greedy, max_tokens: 80, response_format });
  assert.equal(answer.choices[0].finish_reason, "stop");
  const found = JSON.parse(answer.choices[0].message.content);
  assert.deepEqual(Object.keys(found), ["city", "population"]);
  assert.ok(Number.isInteger(found.population) && found.population <= 99);
});

test("a tool that has to be called", async () => {
  const parameters = { type: "object", properties: { city: { type: "string", maxLength: 12 } }, required: ["city"] };
  const tools = [{ type: "function", function: { name: "weather", parameters, strict: true } }];
  const asked = { ...greedy, max_tokens: 80, tools, tool_choice: "required", parallel_tool_calls: false };
  const whole = await ai.chat.completions.create(asked);
  assert.equal(whole.choices[0].finish_reason, "tool_calls");
  const [call] = whole.choices[0].message.tool_calls;
  assert.equal(call.function.name, "weather");
  assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)), ["city"]);
  const streamed = await ai.chat.completions.stream(asked).finalChatCompletion();
  assert.equal(streamed.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
  const turns = [
    ...messages,
    whole.choices[0].message,
    { role: "tool", tool_call_id: call.id, content: "Rain." },
  ];
  const answer = await ai.chat.completions.create({ ...greedy, messages: turns, tools });
  assert.equal(typeof answer.choices[0].message.content, "string");
});

test("errors have their class, and name the field", async () => {
  await assert.rejects(ai.chat.completions.create({ ...greedy, temperature: -1 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "temperature");
    assert.match(error.message, /expected a number in \[0, 100\]/);
    return true;
  });
  await assert.rejects(ai.chat.completions.create({ ...greedy, model: "huge" }), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError);
    assert.equal(error.code, "model_not_found");
    return true;
  });
  const endless = { ...greedy, stream: true, messages: [{ role: "user", content: "a ".repeat(10_000) }] };
  await assert.rejects(ai.chat.completions.create(endless), (error) => {
    assert.equal(error.code, "context_length_exceeded");
    return true;
  });
});

test("closing streams, before and after their first words", async () => {
  const endless = { ...greedy, max_tokens: 1200, ignore_eos: true, stream: true };
  for (const after of [1, 3]) {
    const stream = await ai.chat.completions.create(endless);
    let chunks = 0;
    for await (const _ of stream) if (++chunks === after) break;
    assert.ok(stream.controller.signal.aborted, "leaving the loop closes the connection");
  }
  const impatient = new AbortController();
  const asking = ai.chat.completions.create({ ...endless, stream: false }, { signal: impatient.signal });
  setTimeout(() => impatient.abort(), 200);
  await assert.rejects(asking, OpenAI.APIUserAbortError);
});
