"""The emulator: replays a trace against a cluster on paper, in virtual time, and tells what its clients saw.

trace ─▶ clients, one per request, at their arrival ─▶ EmulatedCluster (the production code) ─▶ records
"""

from __future__ import annotations

import asyncio
import gc
import math
import re
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import cast

from cluster.controller import Flip, Scale
from cluster.messages import Chunk, Complete, GenerateRequest
from cluster.planning import virtual_loop
from cluster.planning.cost_runner import sleep_until
from cluster.planning.emulated_cluster import EmulatedCluster
from cluster.planning.emulation_costs import costs_of
from cluster.planning.emulation_result import EmulationResult, Ending, RequestRecord
from cluster.planning.emulation_spec import EmulationSpec
from cluster.planning.trace import Trace, TracePrompts, TraceRequest
from engine.errors import DeadlineExceeded, InvalidArgument, Overloaded, TandemError
from engine.sampling import SamplingParams

# Objects that may be made before the garbage collector looks for cycles. An emulation makes millions that last and
# hardly a cycle: at Python's default of 700 a third of the time goes into looking.
GC_OBJECTS = 200_000


def emulate(spec: EmulationSpec, trace: Trace, *, stop_below: float | None = None) -> EmulationResult:
    """Replays `trace`, which must have arrivals, to its last answer. The same spec and trace give the same result.

    `stop_below`: ends early once that share of all requests can no longer meet their objectives, whatever comes.
    Raises ConfigError for a spec that cannot be built.
    """
    began_s = time.perf_counter()
    run = _Run(spec, trace, stop_below)
    with _collected_seldom():
        events, virtual_s = virtual_loop.run(run.run())
    return EmulationResult(
        records=tuple(sorted(run.records, key=lambda record: record.index)),
        objectives=spec.objectives,
        offered=len(trace),
        rate_rps=trace.rate_rps,
        gpus=run.cluster.gpus,
        virtual_s=virtual_s,
        wall_s=time.perf_counter() - began_s,
        events=events,
        is_whole=len(run.records) == len(trace),
        actions=run.actions,
    )


class _Run:
    """One emulation's clients and what became of them."""

    def __init__(self, spec: EmulationSpec, trace: Trace, stop_below: float | None) -> None:
        self._spec = spec
        self._trace = trace
        self._arrivals_s = trace.arrivals_s
        self._prompts = TracePrompts(trace)
        costs = costs_of(spec)
        self._max_context = costs.max_context
        self._asked_tokens = spec.asked_tokens or max(request.output_tokens for request in trace.requests)
        self.cluster = EmulatedCluster(spec, costs, self._prompts.vocab_size, self._length_of)
        self._gateway = self.cluster.gateway
        self.records: list[RequestRecord] = []
        self._may_miss = len(trace) if stop_below is None else may_miss(len(trace), stop_below)
        self._missed = 0
        self._start_s = 0.0

    async def run(self) -> tuple[int, float]:
        """(events, virtual seconds) of the whole."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, virtual_loop.VirtualLoop), "an emulation runs in virtual time"
        async with self.cluster.running() as workers:
            self._start_s = loop.time()
            gc.freeze()
            clients = asyncio.create_task(self._serve_all(), name="clients")
            try:
                await asyncio.wait([clients, *workers], return_when=asyncio.FIRST_COMPLETED)
                for task in workers:
                    if task.done():
                        task.result()
                await clients
            finally:
                clients.cancel()
                await asyncio.wait([clients])
            return loop.events, loop.time() - self._start_s

    @property
    def actions(self) -> tuple[tuple[float, Flip | Scale], ...]:
        """What the controller did, if there is one, and when."""
        controller = self.cluster.controller
        done = [] if controller is None else controller.actions
        return tuple((when_s - self._start_s, action) for when_s, action in done)

    async def _serve_all(self) -> None:
        """Ends with the last client, or when too many have missed. A client that crashes takes the run with it."""
        clients: dict[asyncio.Task[None], None] = {}
        changed = asyncio.Event()
        crashed: list[BaseException] = []

        def ended(client: asyncio.Task[None]) -> None:
            del clients[client]
            if not client.cancelled() and (bug := client.exception()) is not None:
                crashed.append(bug)
            changed.set()

        try:
            for index, arrival_s in enumerate(self._arrivals_s):
                await sleep_until(self._start_s + arrival_s)
                if self._is_lost or crashed:
                    break
                client = asyncio.create_task(self._serve(index))
                clients[client] = None
                client.add_done_callback(ended)
            while clients and not (self._is_lost or crashed):
                changed.clear()
                await changed.wait()
        finally:
            left = list(clients)
            for client in left:
                client.cancel()
            await asyncio.gather(*left, return_exceptions=True)
        for bug in crashed:
            raise bug

    @property
    def _is_lost(self) -> bool:
        return self._missed > self._may_miss

    def _length_of(self, wire_id: str) -> int:
        """Of the answer to a request, by its id on the wire: r<index>#<number of the attempt>."""
        return self._trace.requests[int(wire_id[1:].partition("#")[0])].output_tokens

    def _asked(self, wanted: TraceRequest) -> int:
        """The longest answer that its client would take, as far as the model's context has room."""
        room = self._max_context - wanted.prompt_tokens
        return max(wanted.output_tokens, min(self._asked_tokens, room))

    async def _serve(self, index: int) -> None:
        """One client: asks, reads to the end, takes down what it saw."""
        clock = asyncio.get_running_loop().time
        wanted = self._trace.requests[index]
        request = GenerateRequest(
            request_id=f"r{index}",
            prompt=self._prompts.token_ids(index),
            params=SamplingParams(temperature=0.0, max_tokens=self._asked(wanted), ignore_eos=True, seed=0),
            deadline_s=self._spec.deadline_s(wanted.output_tokens),
            objectives=self._spec.objectives,
        )
        arrived_s = clock()
        first_s = last_s = None
        ending, reason, tokens, complete = Ending.DONE, "", 0, None
        try:
            async with aclosing(cast(AsyncGenerator[Chunk | Complete, None], self._gateway.generate(request))) as parts:
                async for part in parts:
                    if isinstance(part, Complete):
                        complete = part
                        break
                    last_s = clock()
                    first_s = last_s if first_s is None else first_s
                    tokens += len(part.tokens)
        except TandemError as error:
            ending, reason = _ending(error), _reason(error)
        assert ending is not Ending.DONE or tokens == wanted.output_tokens, f"r{index} ends after {tokens} tokens"
        record = RequestRecord(
            index=index,
            arrival_s=arrived_s - self._start_s,
            ended_s=clock() - self._start_s,
            prompt_tokens=wanted.prompt_tokens,
            output_tokens=wanted.output_tokens,
            ending=ending,
            ttft_s=None if first_s is None else first_s - arrived_s,
            tpot_s=_tpot_s(first_s, last_s, tokens) if complete is not None else None,
            reason=reason,
            cached_tokens=0 if complete is None else complete.usage.cached_tokens,
            receipt=None if complete is None else complete.receipt,
        )
        self.records.append(record)
        self._missed += not record.meets(self._spec.objectives)


def may_miss(requests: int, target: float) -> int:
    """How many of so many requests may miss before the target is out of reach."""
    # A share such as 0.9 is not exact: without a hair of room 100 misses of 1,000 would be one too many.
    return requests - math.ceil(requests * target - 1e-9)


def _tpot_s(first_s: float | None, last_s: float | None, tokens: int) -> float:
    """Mean seconds per token after the first; 0.0 for a single one."""
    return 0.0 if first_s is None or last_s is None or tokens < 2 else (last_s - first_s) / (tokens - 1)


def _ending(error: TandemError) -> Ending:
    if isinstance(error, Overloaded | InvalidArgument):
        return Ending.REJECTED
    return Ending.LATE if isinstance(error, DeadlineExceeded) else Ending.FAILED


def _reason(error: TandemError) -> str:
    """What went wrong, without the numbers that make every message another one."""
    words = re.sub(r"\d[\d.,]*", "#", str(error))
    return f"{type(error).__name__}: {words}"


@contextmanager
def _collected_seldom() -> Iterator[None]:
    """New objects are looked at less often; `gc.freeze` in between sets aside what is there by then."""
    before = gc.get_threshold()
    gc.set_threshold(GC_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
