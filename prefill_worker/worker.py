"""The prefill loop: one task that owns the pool and the scheduler, and one stream per request that only waits on it.

    stream (RPC)                    loop                                      runner
    ─ Arrive ────────────▶ inbox ─▶ schedule ─────────────────────────────▶  forward, layer group by layer group
    ◀ Begin, KV frames ◀── sender ◀─ publish (after each layer group) ◀─────  on_layers
    ◀ first token, rest ◀─ sender ◀─ complete
    ─ Depart ────────────▶ inbox ─▶ blocks back, between steps

The stream's generator is the lease: however it ends (read out, cancelled, peer gone), its `finally` sends Depart.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import asdict, dataclass
from functools import partial

from engine.batch import Runner
from engine.block_pool import BlockPool
from engine.errors import DeadlineExceeded, HandedBack, InvalidArgument, LayoutMismatch, TandemError
from engine.inbox import INBOX_LIMIT, Inbox
from engine.kv_events import KVEventBatch
from engine.learned_cost import learned, learner
from engine.pulse import Pulse
from engine.request_checks import check_context, check_params, check_seconds, check_token_ids
from engine.running_average import RunningAverage
from engine.stats import LoopStats
from engine.step_cost import StepCost, work_of
from kvtransfer.frames import Begin, FirstToken, Frame
from kvtransfer.send import KVSender
from kvtransfer.transport import MAX_WANTED, PrefillCall
from prefill_worker.config import PrefillConfig
from prefill_worker.job import Job
from prefill_worker.observer import Observer
from prefill_worker.scheduler import Chunk, Finished, PrefillBatch, PrefillScheduler


@dataclass(frozen=True, slots=True)
class _Arrive:
    job: Job
    sender: KVSender


@dataclass(frozen=True, slots=True)
class _Depart:
    key: str


@dataclass(frozen=True, slots=True)
class _Drain:
    """What waits is to be given back; with an `error`, whatever is here ends with it."""

    error: TandemError | None = None


class PrefillWorker:
    """Computes prompts and streams their KV while it does. Implements kvtransfer.transport.PrefillService."""

    def __init__(
        self,
        runner: Runner,
        config: PrefillConfig,
        *,
        worker_id: str,
        max_context: int,
        prefix_cache: bool = True,
        cost: StepCost | None = None,
        note_events: bool = False,
        pulse: Pulse | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.worker_id = worker_id
        self._observer = observer
        self._pulse = Pulse() if pulse is None else pulse
        self._runner = runner
        self._config = config
        self._max_context = max_context
        self._cost = cost
        self._learner = learner(cost)
        layout = runner.layout
        self._pool = BlockPool(layout.num_blocks, layout.block_size, prefix_cache, note_events=note_events)
        self._scheduler = PrefillScheduler(self._pool, config, cost)
        self._inbox: Inbox[_Arrive | _Depart | _Drain] = Inbox(INBOX_LIMIT)
        self._senders: dict[str, KVSender] = {}
        self._stream_count = 0
        self._open_streams = 0
        self._is_draining = False
        self._steps = 0
        self._streams_broken = 0
        self._orphan_bytes = 0
        self._tokens_per_s = RunningAverage()

    async def prefill(self, call: PrefillCall) -> AsyncIterator[Frame]:
        """One request's KV stream. Closing the generator frees everything within one step."""
        if self._is_draining:
            raise self._handed_back()
        self._check(call)
        loop = asyncio.get_running_loop()
        now = loop.time()
        deadline = None if call.deadline_s is None else now + call.deadline_s
        self._stream_count += 1
        job = Job(f"{call.request_id}#{self._stream_count}", call, now, deadline)
        sender = KVSender(self._runner, self._config.max_frame_bytes, call.wanted, wants_kv=call.wants_kv)
        self._inbox.offer(_Arrive(job, sender))
        timer = None
        if deadline is not None:
            timer = loop.call_at(deadline, self._expire, sender)
        self._open_streams += 1
        error: TandemError | None = None
        try:
            async with aclosing(sender.frames()) as frames:
                async for frame in frames:
                    yield frame
        except TandemError as raised:
            error = raised
            raise
        finally:
            if self._observer is not None:
                job.sent_s = sender.ended_s
                self._observer.ended(job, loop.time(), error)
            if timer is not None:
                timer.cancel()
            self._open_streams -= 1
            if not sender.is_sent:
                self._streams_broken += 1
                self._orphan_bytes += sender.published_bytes
            self._inbox.put(_Depart(job.key))

    async def run(self) -> None:
        """The loop. Runs until cancelled; a step under way is awaited first."""
        while True:
            self._inbox.drain(self._handle)
            now = asyncio.get_running_loop().time()
            batch = self._scheduler.schedule(now)
            if batch is None:
                await self._rest(now)
            else:
                await self._step(batch)

    def drain(self) -> None:
        """Gives back, as HandedBack, the prompts that wait, and from now on whatever comes. The rest is served to its
        end."""
        self._is_draining = True
        self._inbox.put(_Drain())

    def resume(self) -> None:
        """Drains no more."""
        self._is_draining = False

    def let_go(self, error: TandemError) -> None:
        """Drains, and ends with `error` what has begun as well."""
        self._is_draining = True
        self._inbox.put(_Drain(error))

    @property
    def is_idle(self) -> bool:
        """No prompt is to be computed, no stream is open, and nobody holds a block."""
        return not self._open_streams and not self._inbox and self._scheduler.is_empty

    def kv_events(self) -> KVEventBatch | None:
        """Changes of the prefix cache since the last call; None without any, or without `note_events`."""
        return self._pool.take_events()

    def kv_snapshot(self) -> KVEventBatch:
        """All that the prefix cache holds. `kv_events` goes on from here."""
        return self._pool.snapshot()

    def stats(self) -> LoopStats:
        own = learned(self._learner)
        return LoopStats(
            running=self._scheduler.running_count,
            waiting=self._scheduler.waiting_count,
            queued_tokens=self._scheduler.queued_tokens,
            blocks_total=self._pool.num_blocks,
            blocks_free=self._pool.available_count,
            blocks_cached=self._pool.cached_count,
            block_size=self._pool.block_size,
            steps=self._steps,
            prefill_tokens_per_s=self._tokens_per_s.value,
            draining=self._is_draining,
            queued_s=self._scheduler.queued_s,
            prefill_scale=own.prefill_scale,
            decode_scale=own.decode_scale,
            cost_error_median=own.error_median,
            cost_error_p90=own.error_p90,
            kv_streams_broken=self._streams_broken,
            kv_orphan_bytes=self._orphan_bytes,
            **asdict(self._pool.counts),
        )

    def check_empty(self) -> None:
        """Asserts that no stream holds anything, and that the pool's books agree."""
        self._pool.check()
        assert not self._pool.owners, f"blocks are still held by {self._pool.owners}"
        assert not self._senders, f"streams are still open: {list(self._senders)}"

    def _check(self, call: PrefillCall) -> None:
        if not call.token_ids:
            raise InvalidArgument("prompt", "no tokens", "at least one token")
        check_context("prompt", len(call.token_ids), self._max_context)
        check_token_ids("prompt", call.token_ids, self._runner.vocab_size)
        check_params(call.params, self._runner.vocab_size, can_guide=self._runner.can_guide)
        check_seconds(deadline_s=call.deadline_s, ttft_due_s=call.ttft_due_s)
        if not 0 <= call.prompt_tokens <= len(call.token_ids):
            expected = f"at most {len(call.token_ids)}, the tokens given"
            raise InvalidArgument("prompt_tokens", call.prompt_tokens, expected)
        if not 0 <= call.have_tokens < len(call.token_ids):
            raise InvalidArgument("have_tokens", call.have_tokens, f"an integer in [0, {len(call.token_ids)})")
        self._check_wanted(call)
        if not self._runner.layout.matches(call.layout):
            raise LayoutMismatch(f"this worker's KV is {self._runner.layout}, the caller's is {call.layout}")

    def _check_wanted(self, call: PrefillCall) -> None:
        if len(call.wanted) > MAX_WANTED:
            raise InvalidArgument("wanted", f"{len(call.wanted)} parts", f"at most {MAX_WANTED}")
        layout, tokens = self._runner.layout, len(call.token_ids)
        for part in call.wanted:
            is_inside = 0 <= part.first_token < part.end_token <= tokens
            is_inside = is_inside and 0 <= part.first_layer < part.end_layer <= layout.num_layers
            ends_block = part.end_token == tokens or part.end_token % layout.block_size == 0
            if not is_inside or part.first_token % layout.block_size or not ends_block:
                expected = f"whole blocks of {layout.block_size} tokens, of {tokens} in {layout.num_layers} layers"
                raise InvalidArgument("wanted", part, expected)

    def _expire(self, sender: KVSender) -> None:
        self._pool.counts.lease_expiries += 1
        sender.fail(DeadlineExceeded("prefill"))

    def _handle(self, message: _Arrive | _Depart | _Drain) -> None:
        match message:
            case _Arrive(job=job, sender=sender):
                try:
                    self._scheduler.arrive(job, asyncio.get_running_loop().time())
                    self._senders[job.key] = sender
                except TandemError as error:
                    sender.fail(error)
            case _Depart(key=key):
                self._senders.pop(key, None)
                self._scheduler.depart(key)
            case _Drain(error=error):
                keys = self._scheduler.waiting_keys() if error is None else list(self._senders)
                for key in keys if self._is_draining else ():
                    self._senders[key].fail(error or self._handed_back())

    def _handed_back(self) -> HandedBack:
        return HandedBack(f"prefill worker {self.worker_id} drains and takes no new prompts")

    async def _rest(self, now: float) -> None:
        """Nothing can be computed: waits for mail."""
        lost = self._scheduler.is_starved or (self._scheduler.is_empty and self._pool.owners)
        assert not lost, f"{self.worker_id}: blocks are held by nobody who is here: {self._pool.owners}"
        self._pool.check_at_times(now)
        await self._pulse.rest(self._runner, self._pool, self._inbox, self._handle)

    async def _step(self, batch: PrefillBatch) -> None:
        loop = asyncio.get_running_loop()
        for job in batch.started:
            self._begin(job)
        work = work_of(batch.batch)
        self._pulse.begins(work)
        start = loop.time()
        run = self._runner.run(batch.batch, partial(self._publish, batch.chunks))
        out = await self._inbox.serve_while(run, self._handle)
        self._steps += 1
        now = loop.time()
        self._pulse.ends(now)
        self._tokens_per_s.add(batch.batch.token_count / max(now - start, 1e-9))
        if self._cost is not None:
            self._cost.observe(work, now - start)
        for finished in self._scheduler.complete(batch, out):
            self._finish(finished, now)

    def _begin(self, job: Job) -> None:
        sender = self._senders.get(job.key)
        if sender is None:
            return
        # Both sides' block sizes are powers of two, so this is a boundary for the caller as well.
        first_token = job.call.have_tokens // self._pool.block_size * self._pool.block_size
        sender.begin(Begin(len(job.call.token_ids), first_token, job.cached, self._runner.layout))
        if first_token < job.cached:
            blocks = self._pool.export(job.key, first_token, job.cached)
            sender.publish(blocks, first_token, job.cached, range(self._runner.layout.num_layers))

    def _publish(self, chunks: tuple[Chunk, ...], first_layer: int, end_layer: int) -> None:
        """Offers what a layer group of a running step has just written: complete blocks, and the prompt's last ones."""
        size = self._pool.block_size
        for chunk in chunks:
            sender = self._senders.get(chunk.job.key)
            if sender is None:
                continue
            is_last = chunk.end == len(chunk.job.call.token_ids)
            start = max(chunk.start, chunk.job.call.have_tokens) // size * size
            end = chunk.end if is_last else chunk.end // size * size
            sender.publish(chunk.block_ids[start // size :], start, end, range(first_layer, end_layer))

    def _finish(self, finished: Finished, now: float) -> None:
        job = finished.job
        job.finished_s = now
        sender = self._senders.get(job.key)
        if sender is not None and finished.problem is not None:
            sender.fail(finished.problem)
        elif sender is not None:
            sender.first_token(FirstToken(finished.sampled, job.started_s - job.arrived_s, now - job.started_s))
