"""A worker that changes its role under traffic: nothing is lost, and nothing of the old role is left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest

from cluster.flexible_worker import FlexibleWorker
from cluster.links import DecodeLinks
from cluster.registry import HeartbeatReply, Role
from cluster.reporter import Reporter
from decode_worker.config import DecodeConfig
from decode_worker.memory import MemoryDecodeTransport
from decode_worker.stream import DecodeService, Delta, Done, Failed
from decode_worker.worker import DecodeWorker
from engine.emulated_runner import EmulatedRunner
from engine.errors import HandedBack, Unavailable
from kvtransfer.frames import End, FirstToken
from kvtransfer.memory import Link, MemoryNetwork, MemoryPrefillTransport
from kvtransfer.transport import PrefillService
from prefill_worker.config import PrefillConfig
from prefill_worker.worker import PrefillWorker
from tests import emulated
from tests.cluster.fake_decode import on_virtual_time
from tests.emulated import GREEDY, call, submit

MODEL = "m"


class Cluster:
    """Flexible workers on one network, and a gateway's links to them. A worker's address is its name."""

    def __init__(self, latency_s: float = 0.001) -> None:
        link = Link(latency_s, bandwidth_bytes_s=1e5)
        self.prefill_network: MemoryNetwork[PrefillService] = MemoryNetwork(link)
        self.decode_network: MemoryNetwork[DecodeService] = MemoryNetwork(Link(latency_s))
        self.transport = MemoryPrefillTransport(self.prefill_network)
        self.links = DecodeLinks(MemoryDecodeTransport(self.decode_network))
        self.workers: dict[str, FlexibleWorker] = {}
        self.runner: EmulatedRunner = emulated.runner(64)

    def add(self, name: str, role: Role, flip_limit_s: float = 60.0) -> FlexibleWorker:
        runner = emulated.runner(64)

        def make_prefill() -> PrefillWorker:
            return PrefillWorker(runner, PrefillConfig(max_frame_bytes=4096), worker_id=name, max_context=1 << 16)

        def make_decode() -> DecodeWorker:
            return DecodeWorker(
                runner, DecodeConfig(), self.transport, worker_id=name, eos_token_ids=frozenset(), max_context=200
            )

        worker = FlexibleWorker(make_prefill, make_decode, role, worker_id=name, flip_limit_s=flip_limit_s)
        self.workers[name] = worker
        self.prefill_network.register(name, worker)
        self.decode_network.register(name, worker)
        return worker

    async def answer(self, decode: str, prefill: str, tokens: int, name: str) -> list[int]:
        """One request's tokens. Raises what it failed with."""
        got: list[int] = []
        async with self.links.submit(decode, submit(tokens, name, prefill_address=prefill)) as events:
            async for event in events:
                match event:
                    case Delta(tokens=new):
                        got += [token.token_id for token in new]
                    case Failed(error=error):
                        raise error
                    case Done():
                        pass
        assert got == self.runner.expected_tokens(range(tokens), GREEDY, 0, 0, GREEDY.max_tokens)
        return got


@asynccontextmanager
async def running(cluster: Cluster) -> AsyncIterator[None]:
    async with emulated.running(*(worker.run() for worker in cluster.workers.values())):
        yield
        await asyncio.sleep(0.2)
        for worker in cluster.workers.values():
            worker.check_empty()
        assert not cluster.prefill_network.open_streams()
        await cluster.links.close()
        assert not cluster.decode_network.open_streams()


@on_virtual_time
async def test_both_ways_under_traffic():
    """Four workers; one of each pool changes over, twice, while requests go to whoever is not draining."""
    cluster = Cluster()
    for index in range(2):
        cluster.add(f"p{index}", "prefill")
        cluster.add(f"d{index}", "decode")
    answered = handed_back = 0

    def serving(role: Role) -> list[str]:
        return [
            worker.worker_id for worker in cluster.workers.values() if worker.role == role and not worker.is_draining
        ]

    async def client(index: int, decode: str, prefill: str) -> None:
        nonlocal answered, handed_back
        try:
            await cluster.answer(decode, prefill, 3 + index % 50, f"r{index}")
        except HandedBack:
            handed_back += 1
            await cluster.answer(serving("decode")[0], serving("prefill")[0], 3 + index % 50, f"r{index}")
        answered += 1

    async def clients() -> None:
        for index in range(300):
            prefills, decodes = serving("prefill"), serving("decode")
            await asyncio.sleep(0.02)
            prefill = prefills[index % len(prefills)] if index % 5 else ""
            tasks.append(asyncio.create_task(client(index, decodes[index % len(decodes)], prefill)))

    tasks: list[asyncio.Task[None]] = []
    async with running(cluster):
        traffic = asyncio.create_task(clients())
        for name, roles in (("p1", ("decode", "prefill")), ("d1", ("prefill", "decode"))):
            for role in roles:
                await asyncio.sleep(0.5)
                assert await cluster.workers[name].flip(role)
                assert cluster.workers[name].role == role
                assert not cluster.workers[name].stats().draining
        await traffic
        await asyncio.gather(*tasks)
    assert answered == 300
    assert handed_back > 0, "what had not begun on a decode worker went elsewhere"


@on_virtual_time
async def test_a_prefill_workers_drain_waits_for_its_pulls():
    cluster = Cluster()
    worker = cluster.add("w", "prefill")
    async with running(cluster):
        frames = worker.prefill(call(40))
        async with aclosing(frames):
            kinds = []
            # The prompt is computed; its reader takes its time over the KV.
            async for frame in frames:
                kinds.append(type(frame))
                if isinstance(frame, FirstToken):
                    break
            flip = asyncio.create_task(worker.flip("decode"))
            await asyncio.sleep(5.0)
            assert worker.stats().draining
            assert worker.stats().running == worker.stats().waiting == 0, "the loop itself has nothing to do"
            assert worker.unfinished_count == 1
            assert not flip.done()
            kinds += [type(frame) async for frame in frames]
            assert kinds[-1] is End, "it was read to its end"
        assert await flip
        assert worker.role == "decode"


@on_virtual_time
async def test_a_flip_is_given_up_after_its_limit_and_nothing_is_lost():
    cluster = Cluster()
    worker = cluster.add("w", "prefill", flip_limit_s=3.0)
    async with running(cluster):
        async with aclosing(worker.prefill(call(40))) as frames:
            await anext(frames)
            start = asyncio.get_running_loop().time()
            worker.changed.clear()
            assert not await worker.flip("decode")
            assert 3.0 <= asyncio.get_running_loop().time() - start < 3.1
            assert worker.changed.is_set(), "routing is to know that it serves again"
            assert worker.role == "prefill"
            assert not worker.stats().draining
            assert [type(frame) async for frame in frames][-1] is End, "the stream went on"
        # As long as the gateway goes on asking it is not asked anew.
        worker.ask("decode")
        assert not worker.is_draining
        worker.ask("")
        worker.ask("decode")
        assert worker.is_draining
        worker.ask("decode")
        await asyncio.sleep(0.1)
        assert worker.role == "decode"


@on_virtual_time
async def test_a_flip_is_called_off_by_asking_for_the_present_role():
    cluster = Cluster()
    worker = cluster.add("w", "decode")
    async with running(cluster):
        flip = asyncio.create_task(worker.flip("prefill"))
        await asyncio.sleep(0)
        worker.ask("decode")
        assert not await flip
        assert worker.role == "decode"
        assert not worker.stats().draining


@on_virtual_time
async def test_the_wrong_role_is_unavailable():
    cluster = Cluster()
    worker = cluster.add("w", "decode")
    async with running(cluster):
        with pytest.raises(Unavailable, match="w: this worker is a decode worker now"):
            await anext(worker.prefill(call(4)))
        assert await worker.flip("prefill")
        with pytest.raises(Unavailable, match="w: this worker is a prefill worker now"):
            await cluster.answer("w", "", 4, "r")


@on_virtual_time
async def test_a_gateways_stream_ends_and_opens_anew():
    cluster = Cluster()
    worker = cluster.add("w", "decode")
    async with running(cluster):
        await cluster.answer("w", "", 9, "r1")
        assert cluster.decode_network.open_streams()["w"] == 1
        assert await worker.flip("prefill")
        await asyncio.sleep(0.01)
        assert cluster.decode_network.open_streams()["w"] == 0
        assert await worker.flip("decode")
        await cluster.answer("w", "", 9, "r2")


@on_virtual_time
async def test_a_crash_of_the_loop_is_the_workers():
    class Broken(PrefillWorker):
        async def run(self) -> None:
            await asyncio.sleep(1.0)
            raise AssertionError("block 3 is owned twice")

    runner = emulated.runner()
    worker = FlexibleWorker(
        lambda: Broken(runner, PrefillConfig(), worker_id="w", max_context=1 << 16),
        lambda: pytest.fail("nobody asks for a decode loop"),
        "prefill",
        worker_id="w",
    )
    with pytest.raises(AssertionError, match="block 3 is owned twice"):
        await worker.run()


@on_virtual_time
async def test_the_gateway_releases_a_flip_once_it_knows_of_the_draining():
    """A request that the gateway had sent before it knew is still on its way when the worker is idle."""
    cluster = Cluster(latency_s=1.0)
    worker = cluster.add("w", "decode")
    reporter = Reporter(worker, address="w", incarnation=1, model=MODEL)
    async with running(cluster):
        on_its_way = asyncio.create_task(cluster.answer("w", "", 9, "r"))
        await asyncio.sleep(0.1)
        assert not reporter.collect().stats.draining
        reporter.answered(HeartbeatReply(1.0, role="prefill"))
        assert worker.changed.is_set(), "the next report goes at once"
        # Idle, and the answer to a report from before the draining says nothing about what is on its way.
        reporter.answered(HeartbeatReply(1.0, role="prefill"))
        await asyncio.sleep(0.5)
        assert worker.role == "decode"
        assert reporter.collect().stats.draining
        reporter.answered(HeartbeatReply(1.0))
        await asyncio.sleep(5.0)
        assert worker.role == "decode", 'the gateway has said "" until it has nothing more on its way here'
        with pytest.raises(HandedBack):
            await on_its_way
        assert reporter.collect().stats.draining
        reporter.answered(HeartbeatReply(1.0, role="prefill"))
        worker.changed.clear()
        await worker.changed.wait()
        report = reporter.collect()
        assert (report.role, report.stats.draining) == ("prefill", False)
