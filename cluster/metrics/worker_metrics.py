"""What is shown of every worker: what it last said of itself.

A worker counts since its own start, and so do its series, whatever becomes of the gateway meanwhile: `rate` knows what
a count that falls means. A worker that is known no more takes its series along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.metrics_core import Metric

from cluster.messages import WorkerStatus
from cluster.metrics.families import Counter, Gauge

LABELS = ("role", "worker")
BLOCK_STATES = ("used", "cached", "free")

WORKERS = Gauge("workers", "Workers that may be given work: heard of lately, and not draining.", labels=("role",))
BLOCKS = Gauge(
    "worker_kv_blocks",
    "KV blocks: used by requests, cached (may be taken, and hold a prefix until then) or free.",
    labels=(*LABELS, "state"),
)
GAUGES: dict[Gauge, Callable[[WorkerStatus], float]] = {
    Gauge("kv_cache_usage_perc", "Share of the KV blocks that requests use, from 0 to 1.", LABELS): lambda worker: (
        1.0 - worker.blocks_free / worker.blocks_total
    ),
    Gauge("worker_fresh", "1 for a worker that was heard of lately.", LABELS): lambda worker: worker.fresh,
    Gauge("worker_draining", "1 for a worker that takes nothing new.", LABELS): lambda worker: worker.draining,
    Gauge("worker_heartbeat_age_seconds", "Since its last report.", LABELS): lambda worker: worker.heartbeat_age_s,
    Gauge(
        "worker_start_time_seconds", "When its process started, by its own clock, since 1970.", LABELS
    ): lambda worker: worker.incarnation / 1e9,
    Gauge(
        "worker_requests_running",
        "Prefill: prompts being computed. Decode: choices that get a token at every step.",
        LABELS,
    ): lambda worker: worker.running,
    Gauge(
        "worker_requests_waiting",
        "Prefill: prompts without blocks. Decode: requests whose KV is not there yet, and choices to be recomputed.",
        LABELS,
    ): lambda worker: worker.waiting,
    Gauge("worker_queued_tokens", "Tokens that are to be computed there and are not yet.", LABELS): lambda worker: (
        worker.queued_tokens
    ),
    Gauge(
        "worker_queued_seconds", "What these will take by the worker's own cost model; 0 without one.", LABELS
    ): lambda worker: worker.queued_s,
    Gauge("worker_context_tokens", "Tokens of KV that a decode step reads now.", LABELS): lambda worker: (
        worker.context_tokens
    ),
    Gauge(
        "worker_decode_step_seconds", "Running average of its decode steps; 0 before the first.", LABELS
    ): lambda worker: worker.decode_step_s,
    Gauge(
        "worker_prefill_tokens_per_second", "Running average of its prompt steps; 0 before the first.", LABELS
    ): lambda worker: worker.prefill_tokens_per_s,
    Gauge(
        "cost_model_error_median_ratio",
        "How far its predictions of its last steps were off, as a share of what they took: median; 0 before the first.",
        LABELS,
    ): lambda worker: worker.cost_error_median,
    Gauge("cost_model_error_p90_ratio", "The 90th percentile of the same.", LABELS): lambda worker: (
        worker.cost_error_p90
    ),
    Gauge(
        "worker_prefill_scale_ratio", "How many times longer prompts take than its device profile says.", LABELS
    ): lambda worker: worker.prefill_scale,
    Gauge(
        "worker_decode_scale_ratio", "How many times longer decode steps take than its device profile says.", LABELS
    ): lambda worker: worker.decode_scale,
}
# By the field of WorkerStatus that they show.
COUNTERS = {
    "steps": Counter("worker_steps", "Forward passes.", LABELS),
    "prefix_queries": Counter("prefix_cache_queries", "Prompt tokens that were looked up in its prefix cache.", LABELS),
    "prefix_hits": Counter("prefix_cache_hits", "Prompt tokens that were found there.", LABELS),
    "preemptions": Counter("num_preemptions", "Sequences that gave their blocks back, to be computed anew.", LABELS),
    "kv_bytes": Counter("kv_received_bytes", "KV that it took in from prefill workers.", LABELS),
    "kv_faults": Counter("kv_faults", "KV frames that came damaged or again, and were fetched once more.", LABELS),
    "kv_streams_broken": Counter(
        "kv_streams_broken",
        "KV streams to decode workers that ended before all was sent: cancelled, lost, or out of time.",
        LABELS,
    ),
    "kv_orphan_bytes": Counter("kv_orphan_bytes", "KV that was computed for those, and is of no use.", LABELS),
    "lease_expiries": Counter(
        "lease_expiries", "Prompts and requests whose time was up before they ended; their blocks went back.", LABELS
    ),
}


def worker_families(model: str, workers: Sequence[WorkerStatus]) -> Iterator[Metric]:
    for gauge, value in GAUGES.items():
        yield gauge.family(model, [(_labels(worker), value(worker)) for worker in workers])
    yield BLOCKS.family(model, [sample for worker in workers for sample in _blocks(worker)])
    yield WORKERS.family(model, [((role,), _able(workers, role)) for role in ("prefill", "decode")])
    for name, counter in COUNTERS.items():
        yield counter.family(model, [(_labels(worker), getattr(worker, name)) for worker in workers])


def _labels(worker: WorkerStatus) -> tuple[str, str]:
    return worker.role, worker.worker_id


def _blocks(worker: WorkerStatus) -> Iterator[tuple[tuple[str, ...], float]]:
    used = worker.blocks_total - worker.blocks_free
    for state, count in zip(
        BLOCK_STATES, (used, worker.blocks_cached, worker.blocks_free - worker.blocks_cached), strict=True
    ):
        yield (*_labels(worker), state), count


def _able(workers: Sequence[WorkerStatus], role: str) -> int:
    return sum(worker.fresh and not worker.draining for worker in workers if worker.role == role)
