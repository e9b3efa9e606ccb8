"""Workers, seconds and requests as the page's JSON has them: times in seconds, sizes in tokens, blocks and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from cluster.history import Second
from cluster.messages import WorkerStatus
from cluster.recent_requests import Recent

COLUMNS = tuple(field.name for field in fields(Second) if field.name != "number")
# Of a time: microseconds are more than anybody reads.
DIGITS = 6


def worker_fields(worker: WorkerStatus) -> dict[str, Any]:
    return {
        "worker_id": worker.worker_id,
        "role": "colocated" if worker.local_only else worker.role,
        "address": worker.address,
        "state": "stale" if not worker.fresh else "draining" if worker.draining else "live",
        "heartbeat_age_s": round(worker.heartbeat_age_s, DIGITS),
        "running": worker.running,
        "waiting": worker.waiting,
        "queued_tokens": worker.queued_tokens,
        "blocks_total": worker.blocks_total,
        "blocks_free": worker.blocks_free,
        "blocks_cached": worker.blocks_cached,
        "kv_faults": worker.kv_faults,
    }


def history_fields(seconds: Sequence[Second]) -> dict[str, Any]:
    """Column by column: their names once, and not once a second."""
    columns = {name: [getattr(second, name) for second in seconds] for name in COLUMNS}
    return {"first_second": seconds[0].number if seconds else None, "columns": columns}


def recent_fields(recent: Recent, to_unix_s: float) -> dict[str, Any]:
    """One row of the table."""
    ended, outcome, usage = recent.ended, recent.ended.outcome, recent.ended.usage
    return {
        "number": recent.number,
        "id": ended.request_id,
        "tenant": ended.tenant,
        "verdict": recent.verdict,
        "ended_unix_s": round(outcome.ended_s + to_unix_s, DIGITS),
        "took_s": round(outcome.ended_s - ended.arrived_s, DIGITS),
        "ttft_s": _rounded(outcome.ttft_s),
        "tpot_s": _rounded(outcome.tpot_s),
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
        "problem": ended.problem,
    }


def request_fields(recent: Recent, to_unix_s: float) -> dict[str, Any]:
    """All that is known of it. `receipt` null: no worker had it. The workers' parts of it are zeros, and mean nothing,
    where `worker_told` is false."""
    ended, outcome = recent.ended, recent.ended.outcome
    return {
        **recent_fields(recent, to_unix_s),
        "met_ttft": outcome.met_ttft,
        "met_tpot": outcome.met_tpot,
        "ttft_objective_s": outcome.objectives.ttft_s,
        "tpot_objective_s": outcome.objectives.tpot_s,
        "was_local": outcome.was_local,
        "finish_reasons": list(ended.finish_reasons),
        "worker_told": ended.worker_told,
        "receipt": None if ended.receipt is None else asdict(ended.receipt),
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, DIGITS)
