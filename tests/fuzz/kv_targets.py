"""The KV stream: its frames, their headers, whole streams as a decode worker reads them, and calls as a prefill worker
does."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from itertools import count
from typing import cast

import xxhash
from google.protobuf.message import DecodeError
from tandem.v1 import prefill_pb2

from cluster.planning.virtual_loop import VirtualLoop
from decode_worker import pull
from decode_worker.pull import Arrived, Began, Ended, News
from decode_worker.sequence import Request, Timeline
from decode_worker.stream import Submit
from engine.batch import Batch, KVLayout, Sampled
from engine.emulated_runner import EmulatedRunner
from engine.errors import CorruptFrame, TandemError
from engine.sampling import SamplingParams
from kvtransfer import frames
from kvtransfer.frames import Arrival, Begin, Damaged, End, FirstToken, Frame, KVBlocks, KVRange
from kvtransfer.grpc_transport import call_to_proto, frame_from_message, frame_to_message
from kvtransfer.transport import PrefillCall
from prefill_worker.config import PrefillConfig
from prefill_worker.server import call_from_proto
from prefill_worker.worker import PrefillWorker
from tests.emulated import submit
from tests.fuzz.target import Target, joined, pieces

LEASE = 7
LAYOUT = KVLayout("m", 2, 1, 1, "uint64", 4, 16)
GREEDY = SamplingParams(temperature=0.0, max_tokens=4)
PROMPT_TOKENS = 9
FRAMES: tuple[Frame, ...] = (
    Begin(PROMPT_TOKENS, 0, 0, LAYOUT),
    KVBlocks(0, 2, 4, 0, 1, bytes(2 * 4 * LAYOUT.token_bytes)),
    FirstToken((Sampled(5, -0.5, ((5, -0.5), (6, -math.inf))),), 0.1, 0.2),
    KVBlocks(8, 1, 1, 0, 2, bytes(2 * LAYOUT.token_bytes)),
    KVBlocks(0, 2, 4, 1, 1, bytes(2 * 4 * LAYOUT.token_bytes)),
    End(288, 128),
)


def no_cost(batch: Batch) -> float:
    return 0.001


# ── one frame ────────────────────────────────────────────────────────────────────────────────────────────────────────


def sealed(header: bytes, payload: bytes) -> bytes:
    """A frame with the checksum that is right for it: or nothing behind that check would ever be tried."""
    checksum = xxhash.xxh3_64_intdigest(header + payload)
    return frames.PREFIX.pack(frames.MAGIC, len(header), checksum) + header + payload


def parts_of(frame: Frame) -> tuple[bytes, bytes]:
    _, header, payload = frames.encode(frame, LEASE)
    return bytes(header), bytes(payload)


def read_header(data: bytes) -> None:
    frame = frames.decode(sealed(*pieces(data, 2)), LEASE)
    # What is taken is what a sender could have meant.
    again = frames.decode(b"".join(frames.encode(frame, LEASE)), LEASE)
    assert repr(_plain(again)) == repr(_plain(frame)), f"{frame} reads as {again} the second time"


def _plain(frame: Frame) -> Frame:
    return replace(frame, payload=bytes(frame.payload)) if isinstance(frame, KVBlocks) else frame


# ── a stream ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Watch:
    def took(self, kv_bytes: int) -> None:
        pass

    def moved(self, address: str, kv_bytes: int, seconds: float) -> None:
        assert min(kv_bytes, seconds) >= 0, "KV cannot have moved backwards"

    def damaged(self, address: str, problem: str, of: Submit) -> None:
        assert problem, "damage has a name"


class _Stream:
    """A prefill worker that sends what it is given, to every call the same."""

    def __init__(self, arrivals: Sequence[Arrival]) -> None:
        self._arrivals = arrivals

    @asynccontextmanager
    async def open(self, address: str, call: PrefillCall) -> AsyncIterator[AsyncIterator[Arrival]]:
        yield self._send()

    async def close(self) -> None:
        """Nothing is open."""

    async def _send(self) -> AsyncIterator[Arrival]:
        for arrival in self._arrivals:
            yield arrival


def read_stream(data: bytes) -> None:
    """The pieces are headers and payloads by turns."""
    parts = pieces(data)
    arrivals = [_arrival(sealed(header, payload)) for header, payload in zip(parts[::2], parts[1::2], strict=False)]
    on_virtual_time(_pulled, arrivals)


def _arrival(wire: bytes) -> Arrival:
    try:
        return frames.decode(wire, LEASE)
    except CorruptFrame as error:
        return Damaged(str(error))


async def _pulled(arrivals: Sequence[Arrival]) -> None:
    runner = EmulatedRunner(LAYOUT, no_cost, 1)
    asked = submit(PROMPT_TOKENS, params=GREEDY, prefill_address="p")
    news: list[News] = []

    def tell(one: News) -> None:
        news.append(one)
        if isinstance(one, Began):
            one.pull.grant.set_result((3, 4, 5))

    request = Request("k", 1, asked, None, Timeline(0.0))
    opened = pull.start(request, runner, _Stream(arrivals), count(LEASE), tell, _Watch())
    assert opened.task is not None, "a pull that was started has a task"
    await opened.task
    await asyncio.sleep(0)
    *_, last = news
    assert isinstance(last, Ended), f"the last word of a stream is {last}"
    has_arrived = any(isinstance(one, Arrived) for one in news)
    assert has_arrived == (opened.error is None), f"all of it came: {has_arrived}, and the error is {opened.error}"


def on_virtual_time(test: Callable[..., object], *arguments: object) -> None:
    """Runs it to its end, however many seconds it waits for. What a task of its own dies of counts as well."""
    unseen: list[object] = []
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.get_loop().set_exception_handler(lambda loop, context: unseen.append(context))
        runner.run(test(*arguments))
    assert not unseen, f"nobody looked at what a task died of: {unseen[0]}"


# ── a call ───────────────────────────────────────────────────────────────────────────────────────────────────────────

CALL = PrefillCall(
    "r",
    tuple(range(PROMPT_TOKENS)),
    SamplingParams(temperature=0.5, top_k=9, seed=3, n=2, max_tokens=5, stop=("x",), logit_bias=((1, 0.5),)),
    seed=3,
    have_tokens=4,
    layout=LAYOUT,
    salt=b"s",
    ttft_due_s=0.5,
    prompt_tokens=8,
    lease=LEASE,
    wanted=(KVRange(4, PROMPT_TOKENS, 0, 2),),
    ticket=b"t",
)


def serve_call(data: bytes) -> None:
    """To the stream's end, as a prefill worker does."""
    on_virtual_time(_served, call_from_proto(prefill_pb2.PrefillRequest.FromString(data), 10.0))


async def _served(call: PrefillCall) -> None:
    worker = PrefillWorker(
        EmulatedRunner(LAYOUT, no_cost, 1), PrefillConfig(token_budget=8), worker_id="p", max_context=1 << 16
    )
    loop = asyncio.create_task(worker.run())
    try:
        async with asyncio.timeout(60.0), aclosing(cast("AsyncGenerator[Frame, None]", worker.prefill(call))) as sent:
            received = [frame async for frame in sent]
        assert isinstance(received[-1], End), f"the last frame is {received[-1]}"
    finally:
        # Whatever was said: the worker stands, and holds nothing.
        await asyncio.sleep(1.0)
        assert not loop.done(), "the loop ended by itself"
        worker.check_empty()
        loop.cancel()
        await asyncio.wait([loop])


def _calls() -> Sequence[bytes]:
    plain = replace(CALL, wanted=(), prompt_tokens=0, params=GREEDY)
    return [call_to_proto(call).SerializeToString() for call in (CALL, plain)]


TARGETS = (
    Target(
        "kv-frame",
        lambda data: frame_from_message(data, LEASE),
        lambda: [frame_to_message(frame, LEASE) for frame in FRAMES],
        (CorruptFrame,),
    ),
    Target("kv-header", read_header, lambda: [joined(*parts_of(frame)) for frame in FRAMES], (CorruptFrame,)),
    Target(
        "kv-stream",
        read_stream,
        lambda: [joined(*(part for frame in FRAMES for part in parts_of(frame)))],
        (),
    ),
    Target("prefill-call", serve_call, _calls, (DecodeError, TandemError)),
)
