"""A decode worker that computes nothing: every request that it has gets one more token every so often, all of them in
one frame, as those of a real batch do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from random import Random

from cluster.heartbeat import report_forever
from cluster.registry import WorkerReport
from cluster.registry_server import send_heartbeat
from decode_worker.server import decode_service
from decode_worker.stream import Delta, Done, Event, Received, Submit, TokenFrame
from engine.batch import Sampled
from engine.request import FinishReason, Receipt
from engine.stats import LoopStats
from kvtransfer.rpc_channel import Channels
from kvtransfer.rpc_server import start_server

BLOCKS = 1 << 20
STATS = LoopStats(
    running=0,
    waiting=0,
    queued_tokens=0,
    blocks_total=BLOCKS,
    blocks_free=BLOCKS,
    blocks_cached=0,
    block_size=16,
    steps=0,
    local_only=True,
)


class PacedWorker:
    """Implements decode_worker.stream.DecodeService. Answers go round in `token_ids` until they are as long as they may
    be."""

    def __init__(self, pace_s: float, token_ids: Sequence[int]) -> None:
        self._pace_s = pace_s
        self._token_ids = token_ids

    async def attach(self, commands: AsyncIterator[Received]) -> AsyncIterator[TokenFrame]:
        drawn: dict[str, int] = {}
        asked: dict[str, Submit] = {}

        async def read() -> None:
            async for command in commands:
                if isinstance(command, Submit):
                    asked[command.request_id], drawn[command.request_id] = command, 0
                else:
                    asked.pop(command.request_id, None)

        reading = asyncio.create_task(read())
        step, loop = 0, asyncio.get_running_loop()
        due_s = loop.time()
        try:
            while True:
                due_s = max(due_s + self._pace_s, loop.time())
                await asyncio.sleep(due_s - loop.time())
                step += 1
                if asked:
                    yield TokenFrame(step, tuple(self._events(asked, drawn)))
        finally:
            reading.cancel()
            await asyncio.wait([reading])

    def _events(self, asked: dict[str, Submit], drawn: dict[str, int]) -> list[Event]:
        events: list[Event] = []
        for request_id, submit in list(asked.items()):
            token = Sampled(self._token_ids[drawn[request_id] % len(self._token_ids)], 0.0)
            drawn[request_id] += 1
            is_last = drawn[request_id] == submit.params.max_tokens
            events.append(Delta(request_id, 0, (token,), FinishReason.LENGTH if is_last else None))
            if is_last:
                del asked[request_id]
                events.append(Done(request_id, 0, Receipt()))
        return events


@asynccontextmanager
async def paced_worker(gateway: str, model: str, pace_s: float, token_ids: Sequence[int]) -> AsyncIterator[str]:
    """Serves one that reports to `gateway`, as a worker of `model`. Yields its address."""
    server = await start_server("127.0.0.1:0", [decode_service(PacedWorker(pace_s, token_ids))])
    channels = Channels()
    # It asks no prefill worker, so that it has nothing to sign.
    report = WorkerReport("paced-0", "decode", server.address, 1, model, STATS, public_key=bytes(32))
    heart = asyncio.create_task(
        report_forever(
            lambda: report, partial(send_heartbeat, channels, gateway), changed=asyncio.Event(), rng=Random(1)
        )
    )
    try:
        yield server.address
    finally:
        heart.cancel()
        await asyncio.wait([heart])
        await channels.close()
        await server.stop()
