"""What the decode loop says of itself. O(1): an emulated cluster asks a thousand workers every second."""

from __future__ import annotations

from dataclasses import asdict

from decode_worker.links import PrefillLinks
from decode_worker.pipeline import Pipeline
from decode_worker.scheduler import DecodeScheduler
from engine.learned_cost import LearnedCost, learned
from engine.stats import LoopStats


def loop_stats(
    scheduler: DecodeScheduler,
    pipeline: Pipeline,
    learner: LearnedCost | None,
    links: PrefillLinks,
    is_draining: bool,
) -> LoopStats:
    """While a run of several steps is under way, blocks and context are those of its first step."""
    pool, own = scheduler.pool, learned(learner)
    return LoopStats(
        running=scheduler.running_count,
        waiting=scheduler.waiting_count,
        queued_tokens=scheduler.queued_tokens,
        blocks_total=pool.num_blocks,
        blocks_free=pool.available_count,
        blocks_cached=pool.cached_count,
        block_size=pool.block_size,
        steps=pipeline.steps,
        prefill_tokens_per_s=pipeline.tokens_per_s.value,
        decode_step_s=pipeline.step_s.value,
        draining=is_draining,
        queued_s=scheduler.queued_s,
        context_tokens=scheduler.context_tokens,
        prefill_scale=own.prefill_scale,
        decode_scale=own.decode_scale,
        cost_error_median=own.error_median,
        cost_error_p90=own.error_p90,
        kv_faults=links.faults,
        kv_bytes=links.kv_bytes,
        **asdict(pool.counts),
    )
