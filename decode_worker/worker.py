"""The decode loop: one task that owns the pool and the scheduler. Sessions, timers and pulls only send it messages.

    gateway stream ─ submit, cancel ─▶ inbox ─▶ schedule ──────▶ runner: one forward pass
    pull tasks ──── news ───────────▶ inbox    complete ◀─────── one token per running choice
    gateway stream ◀─ one frame per step and gateway ◀──┘

With `schedule_ahead` the next step is scheduled, and handed to the runner, while one is under way:

    loop      schedule 2 ── complete 1 ─ schedule 3 ── complete 2 ─ schedule 4 ── …
    runner    1 ─────────▶│ 2 ─────────────────────▶│ 3 ─────────────────────▶│ …

The attached stream's generator is the lease on all of its requests: however it ends, they are cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from itertools import count

from decode_worker.commands import read_commands
from decode_worker.config import DecodeConfig
from decode_worker.flight import DecodeBatch
from decode_worker.live import Live
from decode_worker.messages import Detach, Drain, Expire, FromGateway, Message
from decode_worker.observer import Observer
from decode_worker.open_pulls import OpenPulls
from decode_worker.pipeline import Pipeline
from decode_worker.pull import Arrived, Began, Ended, First, Pull
from decode_worker.repeat import mean_work
from decode_worker.report import loop_stats
from decode_worker.scheduler import DecodeScheduler, Emission
from decode_worker.sequence import Request, Timeline
from decode_worker.session import Session
from decode_worker.stream import Cancel, Done, Event, Failed, Received, Submit, TokenFrame
from engine.batch import Runner
from engine.block_pool import BlockPool
from engine.errors import DeadlineExceeded, HandedBack, InvalidArgument, TandemError
from engine.inbox import INBOX_LIMIT, Inbox
from engine.kv_events import KVEventBatch
from engine.learned_cost import learner
from engine.multi_step import MultiStepRunner
from engine.pulse import Pulse
from engine.stats import LoopStats
from engine.step_cost import StepCost
from kvtransfer.transport import PrefillTransport


class DecodeWorker:
    """Continuous batching over pulled and local prompts. Implements decode_worker.stream.DecodeService. Each KV stream
    gets one of `leases`, numbers that no other stream of this worker had. `observer` is told of requests that end."""

    def __init__(
        self,
        runner: Runner,
        config: DecodeConfig,
        transport: PrefillTransport,
        *,
        worker_id: str,
        eos_token_ids: frozenset[int],
        max_context: int,
        prefix_cache: bool = True,
        cost: StepCost | None = None,
        note_events: bool = False,
        leases: Iterator[int] | None = None,
        pulse: Pulse | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.worker_id = worker_id
        self._observer = observer
        self._runner = runner
        self._pulse = Pulse() if pulse is None else pulse
        self._cost = cost
        self._learner = learner(cost)
        layout = runner.layout
        self._pool = BlockPool(layout.num_blocks, layout.block_size, prefix_cache, note_events=note_events)
        self._scheduler = DecodeScheduler(self._pool, config, eos_token_ids, max_context, cost)
        self._inbox: Inbox[Message] = Inbox(INBOX_LIMIT)
        self._live: dict[str, Live] = {}
        self._serial = 0
        self._session_count = 0
        is_ahead = config.schedule_ahead is True
        self._pipeline = Pipeline(runner, is_ahead, self._pulse)
        self._may_repeat = config.max_steps > 1 and not is_ahead and isinstance(runner, MultiStepRunner)
        self._open = OpenPulls(runner, transport, count() if leases is None else leases, self._inbox.put)
        self._is_draining = False

    async def attach(self, commands: AsyncIterator[Received]) -> AsyncIterator[TokenFrame]:
        """One gateway's stream. Closing the generator cancels all that came by it, within one step."""
        self._session_count += 1
        session = Session(f"s{self._session_count}")
        reader = asyncio.create_task(read_commands(session, commands, self._inbox, lambda: self._pipeline.steps))
        try:
            async for frame in session.frames():
                yield frame
        finally:
            reader.cancel()
            self._inbox.put(Detach(session))
            await asyncio.wait([reader])

    async def run(self) -> None:
        """The loop. Runs until cancelled; steps under way and open pulls are awaited first."""
        try:
            while True:
                self._inbox.drain(self._handle)
                await self._turn()
        finally:
            tasks = self._open.cancel()
            await self._pipeline.call_off()
            await asyncio.gather(*tasks, return_exceptions=True)

    def drain(self) -> None:
        """Gives back, as HandedBack, what has not begun, and from now on whatever comes. The rest is served to its
        end."""
        self._is_draining = True
        self._inbox.put(Drain())

    def resume(self) -> None:
        """Drains no more."""
        self._is_draining = False

    def let_go(self, error: TandemError) -> None:
        """Drains, and ends with `error` what has begun as well."""
        self._is_draining = True
        self._inbox.put(Drain(error))

    @property
    def is_idle(self) -> bool:
        """No request is unfinished, no KV stream is open, and nothing waits to be handled."""
        return not (self._live or self._open or self._inbox) and self._pipeline.is_empty

    def stats(self) -> LoopStats:
        return loop_stats(self._scheduler, self._pipeline, self._learner, self._open.links, self._is_draining)

    def kv_events(self) -> KVEventBatch | None:
        """Changes of the prefix cache since the last call; None without any, or without `note_events`."""
        return self._pool.take_events()

    def kv_snapshot(self) -> KVEventBatch:
        """All that the prefix cache holds. `kv_events` goes on from here."""
        return self._pool.snapshot()

    def link_rates(self) -> tuple[tuple[str, float], ...]:
        """Bytes per second of KV streams, by the prefill worker's address, as measured lately."""
        return self._open.links.rates()

    def check_empty(self) -> None:
        """Asserts that no request holds anything, and that the pool's books agree."""
        self._pool.check()
        assert not self._pool.owners, f"blocks are still held by {self._pool.owners}"
        assert not self._live, f"requests are still here: {list(self._live)}"
        assert self._scheduler.is_empty, "the scheduler still knows requests"

    # ── the loop ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _turn(self) -> None:
        """Schedules a step and, when the runner has all that it may have, waits for the oldest."""
        if not self._pipeline.is_empty:
            is_running = await self._inbox.serve_while(self._pipeline.almost_over(), self._handle)
            if not is_running:
                await self._land()
                return
        batch = self._scheduler.schedule(asyncio.get_running_loop().time())
        self._open_pulls()
        is_granted = self._grant()
        if batch is not None:
            await self._launch(batch)
        elif not self._pipeline.is_empty:
            await self._land()
        elif not is_granted:
            # Otherwise there may be something to schedule now: a prompt that has waited for its turn behind a pull.
            await self._rest()

    async def _launch(self, batch: DecodeBatch) -> None:
        if self._pipeline.is_empty:
            self._scheduler.starts(batch, asyncio.get_running_loop().time())
        await self._pipeline.launch(batch, self._scheduler.repeat(batch) if self._may_repeat else None)
        if not self._pipeline.has_room:
            await self._land()

    async def _land(self) -> None:
        """Waits for the oldest step, or run of steps, reading mail meanwhile, and books it."""
        await self._inbox.serve_until(self._pipeline.oldest, self._handle)
        landed = self._pipeline.land()
        if self._cost is not None:
            self._cost.observe(mean_work(landed.batch.work, len(landed.outs)), landed.seconds / len(landed.outs))
        self._emit(self._scheduler.complete(landed.batch, landed.outs, landed.now))
        if (running := self._pipeline.running) is not None:
            self._scheduler.starts(running, landed.now)
            # What has just become free is not kept waiting for the next `schedule`, which is a step away.
            self._open_pulls()
            self._grant()

    def _settle(self) -> None:
        """Before anything that takes blocks: a run of several steps ends, and takes those that it has used by then."""
        if (run := self._pipeline.cut_short()) is not None:
            self._scheduler.settle(*run)

    async def _rest(self) -> None:
        """Nothing can be computed: makes room for somebody, or waits for mail."""
        demoted = self._scheduler.make_room(asyncio.get_running_loop().time())
        for request in demoted:
            self._live[request.key].close_pull()
        if demoted:
            return
        if not self._open:
            lost = self._scheduler.is_stuck(asyncio.get_running_loop().time()) or (not self._live and self._pool.owners)
            assert not lost, f"{self.worker_id}: blocks are held by nobody who is here: {self._pool.owners}"
        if not self._live:
            self._pool.check_at_times(asyncio.get_running_loop().time())
        await self._pulse.rest(self._runner, self._pool, self._inbox, self._handle)

    # ── messages ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _handle(self, message: Message) -> None:
        match message:
            case FromGateway(session=session, command=Submit() as submit):
                self._submit(session, submit)
            case FromGateway(session=session, command=Cancel() as cancel):
                if (request := session.requests.get(cancel.request_id)) is not None:
                    self._emit([(request, request.done())])
            case Expire(key=key):
                if key in self._live:
                    self._pool.counts.lease_expiries += 1
                    self._fail(self._live[key], DeadlineExceeded("decode"))
            case Detach(session=session):
                for request in list(session.requests.values()):
                    self._drop(self._live[request.key])
            case Drain(error=error):
                ending = [each for each in self._live.values() if error is not None or not each.request.has_begun]
                for each in ending if self._is_draining else ():
                    self._fail(each, error or self._handed_back())
            case Ended(pull=pull):
                self._pull_ended(pull)
            case Began(pull=pull) | First(pull=pull) | Arrived(pull=pull):
                if (live := self._live.get(pull.request.key)) is not None and live.pull is pull:
                    self._handle_pull(live, message)

    def _submit(self, session: Session, submit: Submit) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        try:
            if self._is_draining:
                raise self._handed_back()
            if submit.request_id in session.requests:
                raise InvalidArgument("request_id", submit.request_id, "an id that no running request has")
            # Before anything is made of it: it may ask for billions of choices.
            submit.check(self._runner.vocab_size, can_guide=self._runner.can_guide)
            deadline = None if submit.deadline_s is None else now + submit.deadline_s
            self._serial += 1
            key = f"{session.name}:{submit.request_id}#{self._serial}"
            request = Request(key, self._serial, submit, deadline, Timeline(now))
            self._settle()
            self._scheduler.submit(request, now)
        except TandemError as error:
            session.push(self._pipeline.steps, [Failed(submit.request_id, error)])
            return
        live = Live(request, session)
        if deadline is not None:
            live.timer = loop.call_at(deadline, self._inbox.put, Expire(key))
        self._live[key] = live
        session.requests[submit.request_id] = request
        # Not after the step under way: a prompt that waits for it would have its first token that much later.
        self._open_pulls()

    def _handle_pull(self, live: Live, message: Began | First | Arrived) -> None:
        now = asyncio.get_running_loop().time()
        request = live.request
        match message:
            case Began(begin=begin):
                self._settle()
                self._scheduler.began(request, begin.first_token, begin.cached_tokens)
                self._grant()
            case First(frame=frame):
                request.times.remote_queue_s = frame.queue_s
                request.times.remote_prefill_s = frame.prefill_s
                self._emit(self._scheduler.first_tokens(request, frame.sampled, now))
            case Arrived(end=end, kv_began_s=kv_began_s):
                self._pipeline.cut_short()
                request.times.kv_began_s = kv_began_s
                request.kv_bytes = end.kv_bytes
                request.kv_bytes_before_first_token = end.kv_bytes_before_first_token
                self._scheduler.arrived(request, now)

    # ── pulls ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _open_pulls(self) -> None:
        for request in self._scheduler.start_pulls():
            self._live[request.key].pull = self._open.start(request)

    def _grant(self) -> bool:
        """Whether anybody was given blocks."""
        for request in (granted := self._scheduler.grant(asyncio.get_running_loop().time())):
            pull = self._live[request.key].pull
            assert pull is not None, f"{request.key} waits for blocks without an open stream"
            pull.grant.set_result(self._pool.table(request.lead.owner))
        return bool(granted)

    def _pull_ended(self, pull: Pull) -> None:
        self._open.ended(pull)
        request = pull.request
        if request.is_dropped:
            self._pipeline.cut_short()
            self._scheduler.give_back(request)
            return
        live = self._live[request.key]
        if live.pull is pull:
            live.pull = None
            if pull.error is not None:
                pull.error.is_of_prefill = True
                self._fail(live, pull.error)

    # ── ends ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _emit(self, emissions: Iterable[Emission]) -> None:
        """One push per gateway, whatever the number of its sequences."""
        per_session: dict[Session, list[Event]] = {}
        ended: list[Live] = []
        for request, event in emissions:
            live = self._live[request.key]
            per_session.setdefault(live.session, []).append(event)
            if isinstance(event, Done | Failed):
                ended.append(live)
        for session, events in per_session.items():
            session.push(self._pipeline.steps, events)
        for live in ended:
            self._drop(live, live.request.problem)

    def _fail(self, live: Live, error: TandemError) -> None:
        live.session.push(self._pipeline.steps, [Failed(live.request.submit.request_id, error)])
        self._drop(live, error)

    def _handed_back(self) -> HandedBack:
        return HandedBack(f"decode worker {self.worker_id} drains and takes no new requests")

    def _drop(self, live: Live, error: TandemError | None = None) -> None:
        """Ends a request: finished, cancelled, expired or failed. Its blocks follow once nobody writes to them."""
        self._pipeline.cut_short()
        request = live.request
        if self._observer is not None:
            self._observer.ended(request, asyncio.get_running_loop().time(), error)
        del self._live[request.key]
        del live.session.requests[request.submit.request_id]
        if live.timer is not None:
            live.timer.cancel()
        self._scheduler.withdraw(request)
        is_written = self._open.is_written(request)
        live.close_pull()
        if not is_written:
            self._scheduler.give_back(request)
