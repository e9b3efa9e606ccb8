"""The service as plain processes, used as a user would: through the command line."""

from __future__ import annotations

import json
import signal
import subprocess

import grpc
import httpx
import jsonschema
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.e2e.service import CONFIG, TANDEM, Served, error_of, eventually, is_alive, kill, serving, tandem
from tests.golden.default_model import require_default_model
from tests.metrics.scrape import read

pytestmark = [pytest.mark.model]
GREEDY = ("--temperature", "0", "--max-tokens", "12")
LINES = (
    {"id": "text", "prompt": "The capital of France is"},
    {"id": 2, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 5},
    {"id": "ids", "token_ids": [504, 3575, 282, 4649, 314], "max_tokens": 1},
    {"id": "long", "prompt": "One two three four five. " * 80, "max_tokens": 8},
)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    require_default_model()
    with serving(tmp_path_factory.mktemp("serve"), "--address", "none") as served:
        yield served


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return str(path)


def test_a_file_of_prompts(served: Served, prompts: str):
    answers = served.generate("--file", prompts, *GREEDY)
    assert [answer["id"] for answer in answers] == [line["id"] for line in LINES]
    for answer, line in zip(answers, LINES, strict=True):
        assert set(answer) == {"id", "text", "token_ids", "finish_reason", "usage", "receipt"}
        assert 1 <= len(answer["token_ids"]) <= line.get("max_tokens", 12)
        assert answer["usage"]["completion_tokens"] == len(answer["token_ids"])
        receipt = answer["receipt"]
        assert receipt["prefill_worker"] == "prefill-0"
        assert receipt["decode_worker"] == "decode-0"
        assert receipt["ttft_s"] > 0
    assert answers[0]["text"].startswith(" Paris")
    assert answers[2]["finish_reason"] == "length"
    # What one process alone says.
    local = tandem("generate", "--local", "--json", "--file", prompts, *GREEDY)
    assert local.returncode == 0, local.stderr
    expected = [json.loads(line) for line in local.stdout.splitlines()]
    same = ("id", "text", "token_ids", "finish_reason")
    assert [[answer[key] for key in same] for answer in answers] == [
        [answer[key] for key in same] for answer in expected
    ]


def test_plain_text_is_the_same_text(served: Served):
    arguments = ("The capital of France is", "--url", served.address, *GREEDY)
    plain = tandem("generate", *arguments)
    assert plain.returncode == 0
    assert plain.stderr == ""
    assert plain.stdout == served.generate(arguments[0], *GREEDY)[0]["text"] + "\n"


def test_a_seed_decides(served: Served):
    answers = [served.generate("Once upon a time", "--seed", "7", "--max-tokens", "10")[0] for _ in range(2)]
    assert answers[0]["token_ids"] == answers[1]["token_ids"]


def test_openai_says_the_same(served: Served):
    (expected,) = served.generate("The capital of France is", *GREEDY)
    with openai.OpenAI(base_url=served.openai_url, api_key="none") as client:
        model = client.models.list().data[0].id
        asked = {"model": model, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 12}
        whole = client.completions.create(**asked)
        pieces = [chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)]
        chat = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Say hello."}], temperature=0, max_tokens=5
        )
    assert whole.choices[0].text == "".join(pieces) == expected["text"]
    (said,) = served.generate("Say hello.", "--chat", "--temperature", "0", "--max-tokens", "5")
    assert chat.choices[0].message.content == said["text"]


@pytest.mark.parametrize("temperature", [0, 1])
def test_answers_are_held_to_a_schema(served: Served, temperature: int):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "people": {"type": "integer", "minimum": 1}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    with openai.OpenAI(base_url=served.openai_url, api_key="none") as client:
        answer = client.chat.completions.create(
            model="",
            messages=[{"role": "user", "content": "Name a city of France, and how many people live there."}],
            temperature=temperature,
            seed=3,
            n=2,
            max_tokens=60,
            response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
        )
    said = [choice.message.content for choice in answer.choices if choice.finish_reason == "stop"]
    assert said, answer
    for text in said:
        jsonschema.validate(json.loads(text), schema)


def test_a_tool_that_must_be_called_is_called(served: Served):
    with openai.OpenAI(base_url=served.openai_url, api_key="none") as client:
        city = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
        asked = {
            "model": "",
            "messages": [{"role": "user", "content": "What is the weather in Oslo?"}],
            "tools": [{"type": "function", "function": {"name": "weather", "parameters": city}}],
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "temperature": 0,
            "max_tokens": 80,
        }
        answer = client.chat.completions.create(**asked)
        with client.chat.completions.stream(**asked) as stream:
            streamed = stream.get_final_completion()
    for choice in (answer.choices[0], streamed.choices[0]):
        (call,) = choice.message.tool_calls
        assert (choice.finish_reason, call.function.name) == ("tool_calls", "weather")
        jsonschema.validate(json.loads(call.function.arguments), city)
    assert answer.choices[0].message.tool_calls[0].id != streamed.choices[0].message.tool_calls[0].id


def test_closing_an_openai_stream_frees_its_kv(served: Served):
    with openai.OpenAI(base_url=served.openai_url, api_key="none") as client:
        chunks = client.completions.create(
            model="", prompt="Once upon a time", max_tokens=500, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(chunks))
        assert served.status()["requests_running"] == 1
        chunks.close()
    eventually(lambda: not served.status()["requests_running"], 5)
    eventually(lambda: all(worker["blocks_free"] == worker["blocks_total"] for worker in served.workers().values()), 5)


def test_status(served: Served):
    eventually(lambda: not served.status()["requests_running"], 5)
    status = served.status()
    assert status["model"] == "smollm2-135m-instruct"
    assert {worker["worker_id"]: worker["role"] for worker in status["workers"]} == {
        "decode-0": "decode",
        "prefill-0": "prefill",
    }
    for worker in status["workers"]:
        assert worker["fresh"]
        assert worker["running"] == worker["waiting"] == 0
        assert worker["blocks_free"] == worker["blocks_total"] > 0
    table = tandem("status", "--url", served.address)
    assert table.returncode == 0
    assert "prefill-0" in table.stdout


def test_metrics_are_those_of_the_workers(served: Served):
    root = served.openai_url.removesuffix("/v1")
    before = read(httpx.get(f"{root}/metrics").text)
    [answer] = served.generate("A prompt that nobody has sent before, so that all of its KV has to travel.", *GREEDY)
    receipt, usage = answer["receipt"], answer["usage"]

    def counted(name: str, **labels: str) -> float:
        return read(httpx.get(f"{root}/metrics").text).value(name, **labels) - before.value(name, **labels)

    assert counted("requests_total", outcome="finished") == 1
    assert counted("generation_tokens_total") == usage["completion_tokens"]
    assert 0 < counted("inter_token_latency_seconds_count") < usage["completion_tokens"]
    assert counted("request_kv_bytes_total") == receipt["kv_bytes"] > 0
    # Workers tell of themselves with their next report.
    eventually(lambda: counted("kv_received_bytes_total", worker="decode-0") == receipt["kv_bytes"], 30.0)
    eventually(lambda: counted("prefix_cache_queries_total", worker="prefill-0") == usage["prompt_tokens"], 30.0)
    assert counted("kv_streams_broken_total", worker="prefill-0") == 0, "what was read to its end is whole"
    once = tandem("top", "--once", "--url", served.address)
    assert once.returncode == 0, once.stderr
    assert "prefill-0" in once.stdout


def test_health(served: Served):
    with grpc.insecure_channel(served.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "liveness", "tandem.v1.Inference"):
            reply = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"prompt": "word " * 9000}, "at most 8"),
        ({"token_ids": [49152]}, "token_ids: got 49152, expected a token id in [0, 49152)"),
        ({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9000}, "max_tokens"),
    ],
)
def test_what_the_service_refuses(served: Served, tmp_path, line, expected):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(line) + '\n{"id": "fine", "prompt": "Hello", "max_tokens": 1}\n')
    result = tandem("generate", "--file", str(path), "--url", served.address, "--json")
    assert expected in error_of(result)
    failed, fine = (json.loads(text) for text in result.stdout.splitlines())
    assert failed["error"]["type"] == "InvalidArgument"
    assert fine["usage"]["completion_tokens"] == 1


def test_a_taken_port(served: Served):
    port = served.address.rpartition(":")[2]
    error = error_of(tandem("serve", "--address", "none", "--grpc-port", port))
    assert f"cannot listen on 127.0.0.1:{port}" in error
    assert "in use" in error


def test_a_worker_started_by_hand_joins_and_leaves(served: Served, tmp_path):
    config = served.log.parent / "tandem.yaml"
    gateway = served.log.read_text().partition("workers report to ")[2].split()[0]
    command = [*TANDEM, "worker", "prefill", "--gateway", gateway, "--id", "extra", "--config", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        eventually(lambda: "extra" in served.workers(), 60)
    finally:
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "Traceback" not in stderr
    # Not only silent: it said that it was leaving, and gets no work from then on.
    assert next(worker for worker in served.status()["workers"] if worker["worker_id"] == "extra")
    assert served.generate("Hello", *GREEDY)[0]["receipt"]["prefill_worker"] == "prefill-0"


def test_a_killed_worker_is_started_again(served: Served):
    before = served.workers()["decode-0"]["incarnation"]
    kill([pid for pid, command in served.descendants().items() if "--id decode-0" in command])
    eventually(lambda: served.workers().get("decode-0", {}).get("incarnation", 0) > before, 60)
    assert served.generate("The capital of France is", *GREEDY)[0]["text"].startswith(" Paris")
    assert "worker decode-0 was killed by signal 9; starting it again" in served.log.read_text()


def test_a_hangup_restarts_the_workers_one_at_a_time(served: Served):
    before = {name: worker["incarnation"] for name, worker in served.workers().items()}
    served.process.send_signal(signal.SIGHUP)
    eventually(lambda: "all workers have been restarted" in served.log.read_text(), 120)
    after = {name: worker["incarnation"] for name, worker in served.workers().items()}
    assert after.keys() == before.keys()
    assert all(after[name] > before[name] for name in before)
    log = served.log.read_text()
    for name in before:
        assert f"worker {name} has drained; starting it again" in log
    assert served.generate("The capital of France is", *GREEDY)[0]["text"].startswith(" Paris")


def test_shutdown_leaves_nothing(served: Served):
    """The last test of the module's service. What cannot be finished in time is cut, and told why."""
    processes = served.descendants()
    assert len(processes) == 2
    endless = ("generate", "Once upon a time", "--url", served.address, "--max-tokens", "1400", "--temperature", "0")
    client = subprocess.Popen([*TANDEM, *endless], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    eventually(lambda: served.workers()["decode-0"]["running"] == 1, 20)
    assert served.stop() == 0
    _, stderr = client.communicate(timeout=20)
    assert client.returncode == 2
    assert "the gateway is shutting down" in stderr
    assert not [command for pid, command in processes.items() if is_alive(pid)]
    assert "Traceback" not in served.log.read_text()


def test_workers_do_not_outlive_a_service_that_is_killed(tmp_path):
    require_default_model()
    with serving(tmp_path, "--address", "none", "--prefill", "0") as served:
        processes = served.descendants()
        assert len(processes) == 1
        kill([served.process.pid])
        served.process.wait()
        for pid in processes:
            eventually(lambda pid=pid: not is_alive(pid), 15)


def test_a_worker_that_is_given_up_ends_the_service(tmp_path):
    """In good order: what ran there is recomputed on the other worker, and done before the service ends."""
    require_default_model()
    config = CONFIG.replace("drain_s: 2", "drain_s: 30, max_restarts: 0, colocated: 2")
    with serving(tmp_path, "--address", "none", "--prefill", "0", "--decode", "0", config=config) as served:
        asked = ("generate", "Once upon a time", "--url", served.address, "--max-tokens", "300", "--temperature", "0")
        command = [*TANDEM, *asked, "--json"]
        client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        eventually(lambda: any(worker["running"] for worker in served.workers().values()), 20)
        (busy,) = [name for name, worker in served.workers().items() if worker["running"]]
        kill([pid for pid, command in served.descendants().items() if f"--id {busy}" in command])
        stdout, stderr = client.communicate(timeout=60)
        assert client.returncode == 0, stderr
        assert json.loads(stdout)["receipt"]["decode_worker"] not in ("", busy)
        assert served.process.wait(60) == 2
        *_, reason, end, error = served.log.read_text().splitlines()
        assert end.endswith("shutting down")
        assert f"worker {busy} died too often" in reason
        assert error.startswith(f"tandem: error: worker {busy} died too often")
