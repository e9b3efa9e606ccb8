"""Which workers a request goes to: the pair with the least predicted time to first token. Pure: values in, a value out.

    TTFT  =  prefill queue  +  prefill              at the prefill worker (for a local route: at the decode worker)
          +  wait for KV blocks  +  decode step     at the decode worker

Every term is in seconds and comes from what the workers measured of themselves, plus what this gateway has sent them
since (their reports do not show it yet). A missing measurement is replaced by the configured default.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.gateway_config import RouterConfig
from cluster.registry import Role
from engine.stats import LoopStats


@dataclass(frozen=True, slots=True)
class RouteQuery:
    """What is to be placed. `total_tokens` is the most that prompt and one answer can hold together."""

    prompt_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """A fresh worker's last report, `heard_s` being when it came, and what this gateway added to it since.

    `added_prefill_tokens` are to be computed there; `added_blocks` will be held there.
    """

    worker_id: str
    role: Role
    address: str
    stats: LoopStats
    heard_s: float
    added_prefill_tokens: int = 0
    added_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Route:
    """Where to go. For a local route (prefill on the decode worker) the prefill worker's id and address are ""."""

    prefill_id: str
    prefill_address: str
    decode_id: str
    decode_address: str
    predicted_ttft_s: float


@dataclass(frozen=True, slots=True)
class Defer:
    """No worker can take it now; one may soon."""

    reason: str


@dataclass(frozen=True, slots=True)
class Reject:
    """No worker could ever take it; the fields are InvalidArgument's."""

    field: str
    value: str
    expected: str


def choose(
    query: RouteQuery, workers: Sequence[WorkerLoad], now: float, rng: random.Random, *, config: RouterConfig
) -> Route | Defer | Reject:
    """The pair of least predicted TTFT; `rng` decides between equals. Draining workers are never chosen.

    `workers` are all fresh workers of both roles, each once, in any order. A local route is a candidate only when no
    prefill worker can be used and `config.allow_local`. Reject is for a request that needs more blocks than any of the
    workers owns, draining ones included; without any decode worker the answer is Defer.
    """
    # In order of id, so that the same rng gives the same route whatever the order of `workers`.
    workers = sorted(workers, key=lambda worker: worker.worker_id)
    prefills = [worker for worker in workers if worker.role == "prefill"]
    decodes = [worker for worker in workers if worker.role == "decode"]
    too_large = _too_large(query, prefills, decodes, config.allow_local)
    if too_large is not None:
        return too_large
    prefills = [worker for worker in prefills if _can_take(worker, query.prompt_tokens)]
    decodes = [worker for worker in decodes if _can_take(worker, query.total_tokens)]
    if not decodes:
        return Defer("no decode worker is available")
    if not prefills and not config.allow_local:
        return Defer("no prefill worker is available")

    # Each worker's share once, not once per pair: pairs are many, and only their sum is left to do.
    decode_s = {decode.worker_id: predict_decode_s(query, decode, config) for decode in decodes}
    prefill_s = {at.worker_id: predict_prefill_s(query, at, now, config) for at in prefills or decodes}
    pairs = [(at, decode) for at in prefills for decode in decodes] or [(decode, decode) for decode in decodes]
    costs_s = [prefill_s[at.worker_id] + decode_s[decode.worker_id] for at, decode in pairs]
    least_s = min(costs_s)
    prefill, decode = rng.choice([pair for pair, cost_s in zip(pairs, costs_s, strict=True) if cost_s == least_s])
    is_local = prefill is decode
    return Route(
        prefill_id="" if is_local else prefill.worker_id,
        prefill_address="" if is_local else prefill.address,
        decode_id=decode.worker_id,
        decode_address=decode.address,
        predicted_ttft_s=least_s,
    )


def predict_prefill_s(query: RouteQuery, at: WorkerLoad, now: float, config: RouterConfig) -> float:
    """Seconds until the prompt would be computed at this worker: what is queued there, then the prompt itself."""
    rate = at.stats.prefill_tokens_per_s or config.default_prefill_tokens_per_s
    done_since_report = rate * max(0.0, now - at.heard_s)
    still_queued = max(0.0, at.stats.queued_tokens - done_since_report)
    return (still_queued + at.added_prefill_tokens + query.prompt_tokens) / rate


def predict_decode_s(query: RouteQuery, decode: WorkerLoad, config: RouterConfig) -> float:
    """Seconds until this worker would have blocks for the prompt, and then decode once."""
    step_s = decode.stats.decode_step_s or config.default_decode_step_s
    total = decode.stats.blocks_total
    held = _held_blocks(decode)
    missing = held + blocks_for(query.prompt_tokens + 1, decode.stats.block_size) - total
    # All held blocks turn over within the time of a typical answer. The prompt alone fits, so missing means some held.
    block_wait_s = missing / held * config.typical_answer_tokens * step_s if missing > 0 else 0.0
    # A step reads the KV of all that run: it grows with what is held.
    return block_wait_s + step_s * (1.0 + held / total)


def _held_blocks(worker: WorkerLoad) -> int:
    stats = worker.stats
    return stats.blocks_total - stats.blocks_free + worker.added_blocks


def _too_large(
    query: RouteQuery, prefills: Sequence[WorkerLoad], decodes: Sequence[WorkerLoad], allow_local: bool
) -> Reject | None:
    """The answer to a request that fits none of the pools, None where one of them may take it."""
    limits = [("prompt + max_tokens", query.total_tokens, decodes)]
    if not allow_local:
        limits.append(("prompt", query.prompt_tokens, prefills))
    for field, tokens, pool in limits:
        most = max((worker.stats.blocks_total * worker.stats.block_size for worker in pool), default=tokens)
        if tokens > most:
            return Reject(field, f"{tokens} tokens", f"at most {most}: no worker has KV blocks for more")
    return None


def _can_take(worker: WorkerLoad, tokens: int) -> bool:
    stats = worker.stats
    return not stats.draining and blocks_for(tokens, stats.block_size) <= stats.blocks_total


def blocks_for(tokens: int, block_size: int) -> int:
    """How many blocks a sequence of so many tokens holds."""
    return -(-tokens // block_size)
