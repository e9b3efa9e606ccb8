"""What the in-memory transport adds to the contract: links with exact timing, cuts, and faults in the bytes."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from cluster.planning import virtual_loop
from engine.batch import KVLayout
from engine.errors import Unavailable
from engine.sampling import SamplingParams
from kvtransfer.frames import Damaged, End, Frame, KVBlocks
from kvtransfer.memory import FaultHook, Link, MemoryNetwork, MemoryPrefillTransport
from kvtransfer.transport import PrefillCall, PrefillService

CALL = PrefillCall("r-1", (1, 2), SamplingParams(), 7, 0, KVLayout("m", 1, 1, 1, "float32", 4, 4))
HEADER_BYTES = 64


def kv(index: int, payload_bytes: int) -> KVBlocks:
    return KVBlocks(index, 1, 4, 0, 1, bytes(payload_bytes))


class Script:
    """Yields frames at given times, and remembers when each was asked for and when it was closed."""

    def __init__(self, *frames: tuple[float, Frame]) -> None:
        self.frames = frames
        self.yielded_s: list[float] = []
        self.closed_s: float | None = None

    async def prefill(self, call: PrefillCall) -> AsyncIterator[Frame]:
        loop = asyncio.get_running_loop()
        try:
            for at_s, frame in self.frames:
                await asyncio.sleep(at_s - loop.time())
                self.yielded_s.append(round(loop.time(), 6))
                yield frame
        finally:
            self.closed_s = round(loop.time(), 6)


Body = Callable[[MemoryNetwork[PrefillService], MemoryPrefillTransport], Coroutine[Any, Any, Any]]


def play(link: Link, services: dict[str, PrefillService], body: Body, fault: FaultHook | None = None) -> Any:
    async def main() -> Any:
        network: MemoryNetwork[PrefillService] = MemoryNetwork(link)
        for address, service in services.items():
            network.register(address, service)
        result = await body(network, MemoryPrefillTransport(network, fault))
        assert not network.open_streams()
        return result

    return virtual_loop.run(main())


async def arrivals(transport: MemoryPrefillTransport, address: str = "p", pause_s: float = 0.0) -> list[float]:
    loop = asyncio.get_running_loop()
    times = []
    async with transport.open(address, CALL) as frames:
        async for _ in frames:
            times.append(round(loop.time(), 6))
            await asyncio.sleep(pause_s)
    return times


def test_latency_and_bandwidth_add_up():
    script = Script((0, kv(0, 1000 - HEADER_BYTES)), (0, kv(1, 2000 - HEADER_BYTES)), (10, End(0, 0)))
    times = play(Link(0.5, 1000), {"p": script}, lambda _, transport: arrivals(transport))
    # 0.5 s for the call to get there; then 1 s and 2 s on the line one after the other, 0.5 s on the way.
    assert times == [2.0, 4.0, 10.564]
    assert script.closed_s == 10.0


def test_streams_of_an_address_share_its_line_and_other_addresses_do_not():
    size = 1000 - HEADER_BYTES
    services = {name: Script((0, kv(0, size)), (0, kv(1, size))) for name in "pq"}

    async def body(_: Any, transport: MemoryPrefillTransport) -> list[list[float]]:
        return await asyncio.gather(*(arrivals(transport, address) for address in "ppq"))

    assert play(Link(0, 1000, window=1), services, body) == [[1, 3], [2, 4], [1, 2]]


@pytest.mark.parametrize("window", [1, 3])
def test_the_window_bounds_what_a_slow_reader_lets_through(window: int):
    script = Script(*((0, kv(index, 0)) for index in range(6)))
    play(Link(window=window), {"p": script}, lambda _, transport: arrivals(transport, pause_s=1.0))
    # A window's worth at once, and one more for each that is taken; the first is taken at once.
    assert script.yielded_s == [0.0] * (window + 1) + [float(index) for index in range(1, 6 - window)]


def test_a_short_cut_delays_and_a_long_one_breaks_both_ends():
    def body_of(heal_after_s: float) -> Body:
        async def body(network: MemoryNetwork[PrefillService], transport: MemoryPrefillTransport) -> list[float]:
            loop = asyncio.get_running_loop()
            loop.call_later(1.5, network.cut, "p")
            loop.call_later(1.5 + heal_after_s, network.heal, "p")
            return await arrivals(transport)

        return body

    link = Link(keepalive_s=5.0)
    script = Script((1, kv(0, 0)), (2, kv(1, 0)), (20, kv(2, 0)))
    assert play(link, {"p": script}, body_of(heal_after_s=4.0)) == [1.0, 5.5, 20.0]
    script = Script((1, kv(0, 0)), (2, kv(1, 0)), (20, kv(2, 0)))
    with pytest.raises(Unavailable, match="p cannot be reached"):
        play(link, {"p": script}, body_of(heal_after_s=6.0))
    assert script.closed_s == 6.5, "keepalive_s after the cut"


def test_calls_to_an_address_that_is_cut_off_wait_for_it_or_fail():
    async def body(network: MemoryNetwork[PrefillService], transport: MemoryPrefillTransport) -> list[float]:
        network.cut("p")
        asyncio.get_running_loop().call_later(2.0, network.heal, "p")
        return await arrivals(transport)

    script = Script((0, End(0, 0)))
    assert play(Link(keepalive_s=3.0), {"p": script}, body) == [2.0]
    script = Script((0, End(0, 0)))
    with pytest.raises(Unavailable, match="p cannot be reached"):
        play(Link(keepalive_s=1.0), {"p": script}, body)
    assert script.closed_s is None, "the call never got there"


def test_a_killed_address_loses_what_is_in_flight():
    async def body(network: MemoryNetwork[PrefillService], transport: MemoryPrefillTransport) -> list[float]:
        asyncio.get_running_loop().call_later(1.5, network.kill, "p")
        return await arrivals(transport)

    script = Script((1, kv(0, 0)), (9, kv(1, 0)))
    with pytest.raises(Unavailable, match="p is gone"):
        play(Link(latency_s=1.0), {"p": script}, body)
    assert (script.yielded_s, script.closed_s) == ([1.0], 1.5)


def test_faults_drop_repeat_and_corrupt_what_arrives():
    def fault(address: str, frame: Frame, wire: bytes) -> list[bytes]:
        assert address == "p"
        if isinstance(frame, End):
            return [wire[:-1] + bytes([wire[-1] ^ 1])]
        return [wire] * frame.first_token

    async def body(_: Any, transport: MemoryPrefillTransport) -> list[int | str]:
        seen: list[int | str] = []

        async def collect() -> None:
            async with transport.open("p", CALL) as frames:
                async for frame in frames:
                    seen.append(frame.problem if isinstance(frame, Damaged) else frame.first_token)

        await collect()
        return seen

    script = Script((0, kv(0, 9)), (0, kv(1, 9)), (0, kv(2, 9)), (0, End(0, 0)))
    assert play(Link(), {"p": script}, body, fault) == [1, 2, 2, "KV frame checksum mismatch"]


def test_a_bug_in_the_server_reaches_the_reader_as_it_is():
    class Buggy:
        async def prefill(self, call: PrefillCall) -> AsyncIterator[Frame]:
            yield kv(0, 0)
            raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        play(Link(), {"p": Buggy()}, lambda _, transport: arrivals(transport))


def test_two_services_cannot_share_an_address():
    network: MemoryNetwork[PrefillService] = MemoryNetwork()
    network.register("p", Script())
    with pytest.raises(AssertionError, match="two services at p"):
        network.register("p", Script())
    network.kill("p")
    network.register("p", Script())
