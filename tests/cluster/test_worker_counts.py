"""What workers count since their start, on the virtual clock: the prefix cache, KV that moved, and KV for nobody."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from engine.errors import DeadlineExceeded
from engine.stats import COUNTS, LoopStats
from kvtransfer.frames import FirstToken
from prefill_worker.config import PrefillConfig
from prefill_worker.worker import PrefillWorker
from tests import emulated
from tests.cluster.fake_decode import on_virtual_time
from tests.cluster.test_flexible_worker import Cluster, running
from tests.emulated import call

LAYOUT = emulated.layout()
# Of one token in all layers.
KV_BYTES = LAYOUT.token_bytes * LAYOUT.num_layers


def counts(stats: LoopStats) -> dict[str, int]:
    """All that are not zero, but for the steps."""
    return {name: value for name in COUNTS if name != "steps" and (value := getattr(stats, name))}


@on_virtual_time
async def test_a_prompt_that_comes_again_is_found_in_both_caches() -> None:
    cluster = Cluster()
    prefill, decode = cluster.add("p", "prefill"), cluster.add("d", "decode")
    async with running(cluster):
        await cluster.answer("d", "p", 41, "first")
        assert counts(prefill.stats()) == {"prefix_queries": 41}
        assert counts(decode.stats()) == {"prefix_queries": 41, "kv_bytes": 41 * KV_BYTES}
        await cluster.answer("d", "p", 41, "again")
        # The last token is computed anew, and so is its block.
        assert counts(prefill.stats()) == {"prefix_queries": 82, "prefix_hits": 40}
        assert counts(decode.stats()) == {"prefix_queries": 82, "prefix_hits": 40, "kv_bytes": 42 * KV_BYTES}


@on_virtual_time
async def test_a_prompt_that_is_computed_where_it_is_decoded_is_looked_up_once() -> None:
    cluster = Cluster()
    decode = cluster.add("d", "decode")
    async with running(cluster):
        await cluster.answer("d", "", 41, "local")
    assert counts(decode.stats()) == {"prefix_queries": 41}


@on_virtual_time
async def test_counts_outlive_a_change_of_role() -> None:
    cluster = Cluster()
    worker = cluster.add("w", "decode")
    cluster.add("p", "prefill")
    async with running(cluster):
        await cluster.answer("w", "p", 41, "first")
        before = worker.stats()
        for role in ("prefill", "decode"):
            assert await worker.flip(role)
        assert counts(worker.stats()) == counts(before) != {}
        assert worker.stats().steps == before.steps
        await cluster.answer("w", "p", 41, "second")
        assert worker.stats().prefix_queries == 82


@on_virtual_time
async def test_kv_of_a_stream_that_its_reader_leaves_is_counted_as_orphaned() -> None:
    worker = PrefillWorker(emulated.runner(), PrefillConfig(token_budget=8), worker_id="p", max_context=1 << 16)
    async with emulated.running(worker.run()):
        async with aclosing(worker.prefill(call(30))) as frames:
            async for frame in frames:
                if isinstance(frame, FirstToken):
                    break
        assert counts(worker.stats()) == {
            "prefix_queries": 30,
            "kv_streams_broken": 1,
            "kv_orphan_bytes": 30 * KV_BYTES,
        }
        assert [frame async for frame in worker.prefill(call(30, "again"))]
        assert worker.stats().kv_streams_broken == 1, "one that was read to its end is whole"
        await asyncio.sleep(1)
        worker.check_empty()


@on_virtual_time
async def test_a_prompt_whose_time_is_up_is_an_expired_lease() -> None:
    worker = PrefillWorker(emulated.runner(), PrefillConfig(token_budget=8), worker_id="p", max_context=1 << 16)
    async with emulated.running(worker.run()):
        with pytest.raises(DeadlineExceeded):
            assert [frame async for frame in worker.prefill(call(30, deadline_s=0.03))]
        stats = worker.stats()
        assert (stats.lease_expiries, stats.kv_streams_broken) == (1, 1)
        assert 0 < stats.kv_orphan_bytes < 30 * KV_BYTES, "what was computed by then"
        await asyncio.sleep(1)
        worker.check_empty()


def test_counts_add_up_and_loads_do_not() -> None:
    before = LoopStats(1, 2, 3, 64, 32, 0, 16, 10, prefix_hits=4, kv_bytes=100)
    now = LoopStats(5, 6, 7, 64, 60, 1, 16, 20, prefix_hits=1, lease_expiries=2)
    assert now.plus(None) == now
    assert now.plus(before) == replace(now, steps=30, prefix_hits=5, kv_bytes=100)
