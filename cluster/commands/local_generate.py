"""`tandem generate --local`: the single-process reference, which the service must agree with token by token.

Loads torch, so it is imported only where it runs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from cluster.answer import Answer
from cluster.calls import Result
from cluster.config import TandemConfig
from cluster.intake import prompt_token_ids
from cluster.messages import GenerateRequest, Message, Usage
from cluster.prompt_file import PromptLine
from cluster.served_model import describe
from decode_worker.stream import Delta
from engine.engine import load_engine
from engine.generate import Answer as Generated
from engine.generate import Generator, Prompt
from engine.model_source import Report, resolve
from engine.sampling import SamplingParams
from engine.tokenizer import Tokenizer
from engine.tokenizer import load as load_tokenizer


async def generate_locally(
    lines: Sequence[PromptLine], params: SamplingParams, config: TandemConfig, report: Report
) -> list[Result]:
    """Answers to all lines, in order. Raises the TandemError of the first line that cannot be answered."""
    files = resolve(config.engine.model, report)
    tokenizer = load_tokenizer(files)
    model = describe(config.engine, files, tokenizer)
    prompts: list[Prompt] = []
    for line in lines:
        limited = replace(params, max_tokens=line.max_tokens or params.max_tokens)
        request = GenerateRequest("", _prompt(line), limited)
        token_ids = prompt_token_ids(request, model, tokenizer, config.gateway.max_prompt_chars)
        prompts.append(Prompt(token_ids, limited, random.getrandbits(63) if params.seed is None else params.seed))
    engine = load_engine(config.engine, files)
    try:
        generator = Generator(
            engine.runner,
            frozenset(model.eos_token_ids),
            model.max_context,
            token_budget=config.prefill.token_budget,
            prefix_cache=config.engine.prefix_cache,
        )
        answers = await generator.generate(prompts)
    finally:
        await engine.runner.close()
    return [
        Result(line, _answer(prompt, choices[0], tokenizer))
        for line, prompt, choices in zip(lines, prompts, answers, strict=True)
    ]


def _prompt(line: PromptLine) -> str | tuple[int, ...] | tuple[Message, ...]:
    if isinstance(line.prompt, str):
        return line.prompt
    chat = tuple(Message(*turn) for turn in line.prompt if isinstance(turn, tuple))
    return chat or tuple(token_id for token_id in line.prompt if isinstance(token_id, int))


def _answer(prompt: Prompt, generated: Generated, tokenizer: Tokenizer) -> dict[str, Any]:
    """The same object that a service's answer becomes, by the gateway's own way from tokens to text. No receipt: there
    was no way through a cluster that could have taken time."""
    is_stop = generated.finish_reason == "stop"
    answer = Answer(prompt.params, tokenizer)
    tokens = tuple(generated.tokens)
    stop_id = tokens[-1].token_id if is_stop else None
    answer.add(Delta("", 0, tokens, generated.finish_reason, stop_id), now=0.0)
    choice = answer.choices()[0]
    return {
        "text": choice.text,
        "token_ids": [token.token_id for token in choice.tokens],
        "finish_reason": choice.finish_reason.value,
        "usage": asdict(Usage(len(prompt.token_ids), len(choice.tokens), 0)),
        "receipt": None,
    }
