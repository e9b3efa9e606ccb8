"""Requests made up from the OpenAPI document, right ones and wrong ones, and answers held to it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import load_all_checks
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

# A request that the document allows may still be refused: no schema says that a prompt fits the model's context, or
# that two fields do not go together.
load_all_checks()
EXCLUDED = [positive_data_acceptance]
TIMEOUT_S = 60.0
# Of all requests, against one to each other path: what most can be asked of.
SHARES = {"/v1/chat/completions": 8, "/v1/completions": 8}
CONTRADICTING = {
    *("stream_options", "min_tokens", "top_logprobs", "max_tokens", "logit_bias", "suffix", "best_of", "echo"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "response_format", "slo_class", "on_failure"),
    *("n", "tool_choice", "stop"),
}


def run(url: str, cases: int, seed: int) -> Counter[str]:
    """Sends about so many requests to the service at `url`, one after the other. Counts them by path and status.
    Raises what the first answer that is not as the document says gives cause to."""
    counts: Counter[str] = Counter()
    searches = list(_searches(url))
    shares = [SHARES.get(operation.path, 1) for operation, _ in searches]
    for (operation, mode), share in zip(searches, shares, strict=True):
        _search(operation, mode, math.ceil(cases * share / sum(shares)), seed, counts)
    return counts


def _searches(url: str) -> Iterator[tuple[APIOperation, GenerationMode]]:
    """What has anything to choose. Of paths without it one request says all, and the tests beside this have it."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.body or operation.path_parameters:
            yield operation, GenerationMode.POSITIVE
            yield operation, GenerationMode.NEGATIVE


def _search(operation: APIOperation, mode: GenerationMode, cases: int, seed: int, counts: Counter[str]) -> None:
    @seeded(seed)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), is_mended=st.sampled_from((True, True, True, False)))
    def check(case: Case, is_mended: bool) -> None:
        if is_mended and mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body = _mended(case.body)
        response = case.call(timeout=TIMEOUT_S)
        counts[f"{operation.label} {mode.value} {response.status_code}"] += 1
        # What is too large is not read, so nobody knows that it is wrong.
        unread = [negative_data_rejection] if response.status_code == 413 else []
        case.validate_response(response, excluded_checks=[*EXCLUDED, *unread])

    check()


def _mended(body: dict[str, Any]) -> dict[str, Any]:
    """What no schema says is put right, so that more is asked than read: turns have their text, prompts a token, fields
    that contradict others are left out, and answers are short."""
    left = {name: value for name, value in body.items() if name not in CONTRADICTING}
    if left.get("messages"):
        left["messages"] = [
            {**turn, "role": "user", "content": turn.get("content") or "hello", "tool_calls": None}
            if isinstance(turn.get("content") or "", str)
            else {"role": "user", "content": "hello"}
            for turn in left["messages"]
        ]
        left["max_completion_tokens"] = 4
    elif "prompt" in left:
        left["prompt"] = left["prompt"] or "hello"
        left["max_tokens"] = 4
    return left
