"""A worker whose heartbeats say what is not so: it is refused, or costs only what it is given."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest
from tandem.v1 import worker_pb2

from tests.e2e.attacked import HEARTBEAT, MODEL, lines, scene


def lie(**fields: object) -> worker_pb2.WorkerStats:
    truth = {
        "worker_id": "liar",
        "role": "decode",
        "address": "127.0.0.1:1",
        "incarnation": 1,
        "model": MODEL.name,
        "blocks_total": 1024,
        "blocks_free": 1024,
        "block_size": 16,
    }
    return worker_pb2.WorkerStats(**{**truth, **fields})


LIES = {
    "nan": ({"queued_s": float("nan")}, "queued_s: got nan"),
    "infinite": ({"decode_step_s": float("inf")}, "decode_step_s: got inf"),
    "negative": ({"prefill_tokens_per_s": -1.0}, "prefill_tokens_per_s: got -1.0"),
    "slower than anything": ({"prefill_tokens_per_s": 5e-324}, "prefill_tokens_per_s: got 5e-324"),
    "absurd": ({"context_tokens": (1 << 64) - 1}, "context_tokens"),
    "more free than there are": ({"blocks_free": 1025}, "blocks_free"),
    "from the future": ({"incarnation": (1 << 64) - 1}, "incarnation"),
    "another's id": (
        {"worker_id": "decode-0", "incarnation": 10**18},
        "worker_id: got 'decode-0', expected another name",
    ),
    "long name": ({"worker_id": "x" * 1000}, "worker_id"),
    "lines of the log": ({"worker_id": "x\nERROR all is lost"}, "worker_id"),
    "links": ({"links": [worker_pb2.LinkRate(prefill_address="p", bytes_per_s=float("nan"))]}, "links"),
    "kv names": (
        {"kv_events": worker_pb2.KVEvents(sequence=1, stored=range(100_000))},
        "kv_events: got '100000 names'",
    ),
    "another model": ({"model": "n"}, "model"),
}


@pytest.mark.parametrize("name", LIES)
async def test_a_heartbeat_that_cannot_be_true_is_refused(name: str, caplog: pytest.LogCaptureFixture) -> None:
    fields, text = LIES[name]
    async with scene() as stage:
        for _ in range(20):
            error = await stage.refused(lie(**fields), HEARTBEAT)
            assert error.startswith(f"INVALID_ARGUMENT: {text}"), error
        workers = stage.service.gateway.status(0.0).workers
        assert [worker.worker_id for worker in workers] == ["decode-0", "prefill-0"]
    [line] = lines(caplog)
    assert f"{HEARTBEAT} was refused" in line
    assert "\n" not in line


async def test_the_address_of_another_worker_is_its_own() -> None:
    async with scene() as stage:
        [address] = [worker.address for worker in stage.service.gateway.status(0.0).workers if worker.role == "decode"]
        error = await stage.refused(lie(address=address), HEARTBEAT)
        assert error.startswith("INVALID_ARGUMENT: address"), error


async def test_a_liar_that_is_believed_costs_only_the_requests_that_it_is_given() -> None:
    """It says that it is idle and fast, and nobody is there: its requests go on elsewhere, and it is shunned."""
    async with scene() as stage:
        loop = asyncio.get_running_loop()
        end_s = loop.time() + 2.0
        names = range(20_000)
        sequence = 0
        while loop.time() < end_s:
            sequence += 1
            events = worker_pb2.KVEvents(sequence=sequence, is_snapshot=True, stored=names)
            channel = grpc.aio.insecure_channel(stage.service.address)
            beat = channel.unary_unary(HEARTBEAT)
            await beat(lie(decode_step_s=1e-6, kv_events=events).SerializeToString())
            await channel.close()
            await asyncio.sleep(0.1)
        assert "liar" in {worker.worker_id for worker in stage.service.gateway.status(0.0).workers}
