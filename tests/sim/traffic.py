"""Clients of the simulated cluster: what they ask, how they behave, and what they must see."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from cluster.messages import Choice, Chunk, Complete, GenerateRequest
from engine.emulated_runner import EmulatedRunner
from engine.errors import DeadlineExceeded, Overloaded, TandemError
from engine.request import FinishReason
from engine.sampling import SamplingParams

VOCAB = 1000
EOS = 2
MAX_PROMPT = 180
MAX_TOKENS = 64
MAX_CONTEXT = MAX_PROMPT + MAX_TOKENS


@dataclass
class Client:
    """One request and what became of it. Times are seconds of virtual time; `cancel_after_s` counts from arrival,
    `reads_after_s` from the part before."""

    request: GenerateRequest
    arrives_s: float
    cancel_after_s: float | None = None
    reads_after_s: float = 0.0
    seen: dict[int, list[int]] = field(default_factory=dict)
    complete: Complete | None = None
    error: TandemError | None = None
    ended_s: float | None = None

    def take(self, part: Chunk | Complete) -> None:
        if isinstance(part, Complete):
            self.complete = part
        else:
            assert self.complete is None, "nothing follows Complete"
            self.seen.setdefault(part.index, []).extend(sampled.token_id for sampled in part.tokens)


def draw_clients(rng: random.Random, count: int, rate_s: float) -> list[Client]:
    """Requests that arrive at `rate_s` per second: mixed lengths, shared beginnings, some n > 1, some that give up."""
    beginnings = [[rng.randrange(VOCAB) for _ in range(length)] for length in (0, 0, 16, 40, 70, 100, 100)]
    clients: list[Client] = []
    now = 0.0
    for index in range(count):
        now += rng.expovariate(rate_s)
        client = Client(_draw_request(rng, f"q{index}", rng.choice(beginnings)), now)
        if rng.random() < 0.25:
            client.cancel_after_s = rng.choice([rng.uniform(0, 0.02), rng.uniform(0, 0.3), rng.uniform(0, 3)])
        clients.append(client)
    return clients


def _draw_request(rng: random.Random, name: str, beginning: list[int]) -> GenerateRequest:
    tail_tokens = rng.choice([1, rng.randint(1, 8), rng.randint(1, 30), rng.randint(1, MAX_PROMPT - 100)])
    prompt = (*beginning, *(rng.randrange(VOCAB) for _ in range(tail_tokens)))
    params = SamplingParams(
        temperature=rng.choice([0.0, 0.8]),
        n=rng.choice([1, 1, 1, 1, 2, 4]),
        max_tokens=rng.choice([1, 2, rng.randint(1, MAX_TOKENS), rng.randint(1, MAX_TOKENS)]),
        seed=rng.getrandbits(40),
        ignore_eos=rng.random() < 0.3,
        frequency_penalty=rng.choice([0.0, 0.0, 0.0, 0.5]),
    )
    if rng.random() < 0.2:
        params = replace(params, stop_token_ids=(rng.randrange(VOCAB),), min_tokens=min(2, params.max_tokens))
    deadline_s = rng.choice([rng.uniform(0.001, 0.1), rng.uniform(0.05, 2)]) if rng.random() < 0.2 else None
    salt = rng.choice([b"", b"", b"other tenant"])
    return GenerateRequest(name, prompt, params, salt=salt, deadline_s=deadline_s)


def check_client(
    client: Client,
    oracle: EmulatedRunner,
    late_s: float,
    *,
    may_refuse: bool = False,
    may_fail: tuple[type[TandemError], ...] = (),
) -> None:
    """Every choice is a prefix of the one right answer, and all of it unless the client or its deadline cut it. With
    `may_refuse` the gateway may have refused it, before its first token; `may_fail`: what else may have ended it."""
    name = client.request.request_id
    params = client.request.params
    assert client.ended_s is not None, f"{name} never ended"
    # What a slow reader has not yet read when its deadline passes, it still gets.
    if client.request.deadline_s is not None and not client.reads_after_s:
        outlived_s = client.ended_s - client.arrives_s - client.request.deadline_s
        assert outlived_s <= late_s, f"{name} outlived its deadline by {outlived_s} s"
    expected = [_expected(client.request, oracle, choice) for choice in range(params.n)]
    for index, tokens in client.seen.items():
        assert tokens == expected[index][0][: len(tokens)], (
            f"{name}, choice {index}: {tokens} is no prefix of the answer"
        )
    if client.complete is not None:
        _check_complete(client, client.complete, expected)
        return
    if may_refuse and isinstance(client.error, Overloaded):
        assert not client.seen, f"{name} was refused after its first token"
        return
    if isinstance(client.error, may_fail):
        return
    may_expire = client.request.deadline_s is not None and isinstance(client.error, DeadlineExceeded)
    assert may_expire or client.cancel_after_s is not None, f"{name} failed: {client.error!r}"
    assert may_expire or client.error is None, f"{name} failed before it was cancelled: {client.error!r}"


def _check_complete(client: Client, complete: Complete, expected: list[tuple[list[int], FinishReason]]) -> None:
    name = client.request.request_id
    assert [choice.index for choice in complete.choices] == list(range(client.request.params.n))
    for choice, (tokens, reason) in zip(complete.choices, expected, strict=True):
        assert _token_ids(choice) == tokens == client.seen[choice.index], f"{name}, choice {choice.index}"
        assert choice.finish_reason is reason, f"{name}, choice {choice.index}: {choice.finish_reason}"
    usage = complete.usage
    assert usage.prompt_tokens == len(client.request.prompt)
    assert usage.completion_tokens == sum(len(tokens) for tokens, _ in expected)
    assert 0 <= usage.cached_tokens < usage.prompt_tokens
    receipt = complete.receipt
    phases = (receipt.gateway_queue_s, receipt.prefill_queue_s, receipt.prefill_s)
    phases += (receipt.kv_exposed_s, receipt.decode_queue_s, receipt.decode_s, receipt.ttft_s, receipt.tpot_s)
    assert min(phases) >= 0, f"{name}: a phase took less than no time: {receipt}"
    assert receipt.ttft_s <= (client.ended_s or 0.0) - client.arrives_s
    assert 0 <= receipt.kv_bytes_before_first_token <= receipt.kv_bytes


def _expected(request: GenerateRequest, oracle: EmulatedRunner, choice: int) -> tuple[list[int], FinishReason]:
    params = request.params
    count = min(params.max_tokens, MAX_CONTEXT - len(request.prompt))
    prompt = [int(token_id) for token_id in request.prompt if not isinstance(token_id, str)]
    tokens = oracle.expected_tokens(prompt, params, params.seed or 0, choice, count)
    stops = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
    for position, token_id in enumerate(tokens):
        if token_id in stops:
            return tokens[: position + 1], FinishReason.STOP
    return tokens, FinishReason.LENGTH


def _token_ids(choice: Choice) -> list[int]:
    return [sampled.token_id for sampled in choice.tokens]
