"""`tandem generate`: sends prompts, all at once, and prints their answers in the order of the prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack

from tandem.client import Sampling

from cluster.calls import Result, RunningRequest
from cluster.client_access import OPEN_ACCESS, Access
from cluster.prompt_file import PromptLine
from engine.errors import TandemError
from engine.sampling import SamplingParams

# Stands in for the model's own, which only the service knows; it checks token ids again.
ANY_VOCABULARY = 1 << 32


def sampling_params(max_tokens: int | None, temperature: float | None, seed: int | None) -> SamplingParams:
    """What was given, the rest at its default. Raises InvalidArgument before anything is sent."""
    given = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    params = SamplingParams(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    params.validate(ANY_VOCABULARY)
    return params


async def generate(
    lines: Sequence[PromptLine], url: str, params: SamplingParams, *, access: Access = OPEN_ACCESS, as_json: bool
) -> None:
    """Raises the first request's error, once all have been printed."""
    async with access.client(url) as client, AsyncExitStack() as stack:
        requests = [RunningRequest(client, url, line, _sampling(params, line)) for line in lines]
        for request in requests:
            stack.push_async_callback(request.cancel)
        results: list[Result] = []
        for request, line in zip(requests, lines, strict=True):
            if not as_json:
                await _print_text(request, line, with_title=len(lines) > 1)
            result = await request.result()
            if as_json:
                print_json(result)
            results.append(result)
    raise_first(results)


def print_json(result: Result) -> None:
    print(json.dumps(result.as_json(), ensure_ascii=False), flush=True)


def print_plain(results: Sequence[Result]) -> None:
    """What `generate` prints without --json, for answers that are there already."""
    for result in results:
        if len(results) > 1:
            print(_title(result.line))
        if result.answer is not None:
            print(result.answer["text"])


def raise_first(results: Sequence[Result]) -> None:
    failed = [(result, result.error) for result in results if result.error is not None]
    if len(failed) == 1 and len(results) == 1:
        raise failed[0][1]
    if failed:
        result, error = failed[0]
        raise TandemError(f"{len(failed)} of {len(results)} requests failed; the first, {result.line.where}: {error}")


async def _print_text(request: RunningRequest, line: PromptLine, *, with_title: bool) -> None:
    if with_title:
        print(_title(line))
    is_empty = True
    async for chunk in request.chunks():
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
        is_empty = False
    if not is_empty:
        print(flush=True)


def _title(line: PromptLine) -> str:
    return f"── {line.id} ──"


def _sampling(params: SamplingParams, line: PromptLine) -> Sampling:
    sampling = Sampling(temperature=params.temperature, max_tokens=line.max_tokens or params.max_tokens)
    if params.seed is not None:
        sampling["seed"] = params.seed
    return sampling
