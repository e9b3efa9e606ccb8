"""A decode service in memory that says what it is told to, and a decorator to run tests on virtual time."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from cluster.planning import virtual_loop
from decode_worker.stream import Cancel, Command, DecodeSession, Delta, Done, Event, Failed, Submit, TokenFrame
from engine.batch import Sampled
from engine.errors import HandedBack, TandemError, Unavailable
from engine.request import FinishReason, Receipt

STEP_S = 0.01
CACHED_TOKENS = 2
WORKER_RECEIPT = Receipt(prefill_queue_s=0.5, prefill_s=0.25, kv_bytes=640, kv_bytes_before_first_token=480)


def on_virtual_time(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Runs an async test on the virtual loop; it fails when it leaves tasks behind, or waits for what cannot come."""

    @functools.wraps(test)
    def run(*args: object, **kwargs: object) -> None:
        async def watched() -> None:
            await test(*args, **kwargs)
            await asyncio.sleep(0.001)
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, f"tasks were left behind: {left}"

        virtual_loop.run(watched())

    return run


class FakeDecode:
    """A DecodeTransport to workers that give every choice the same `answer`, one token per STEP_S.

    The last token of `answer` ends a choice as a stop token when it is `eos`; else max_tokens does, or nothing.
    Whatever comes to an address in `draining` is handed back. `is_mute`: it says nothing of what was cancelled.
    """

    def __init__(self, answer: Sequence[int] = (), eos: int | None = None) -> None:
        self.answer = answer
        self.eos = eos
        self.submits: list[tuple[str, Submit]] = []
        self.cancels: list[str] = []
        self.running: set[str] = set()
        self.down: set[str] = set()
        self.draining: set[str] = set()
        self.attached: list[str] = []
        self.error: TandemError | None = None
        self.closed = False
        self.is_mute = False
        self.sessions: dict[str, _FakeSession] = {}

    @asynccontextmanager
    async def attach(self, address: str) -> AsyncIterator[DecodeSession]:
        await asyncio.sleep(STEP_S)
        if address in self.down:
            raise Unavailable(f"nobody listens at {address}")
        session = self.sessions[address] = _FakeSession(self, address)
        self.attached.append(address)
        try:
            yield session
        finally:
            del self.sessions[address]
            await session.close()

    def break_link(self, address: str, error: TandemError | None = None) -> None:
        """Ends the token stream: with an error, or as if it had simply finished."""
        self.sessions[address].outgoing.put_nowait(error)

    def push(self, address: str, *events: Event) -> None:
        self.sessions[address].outgoing.put_nowait(TokenFrame(0, events))

    async def close(self) -> None:
        self.closed = True


class _FakeSession:
    def __init__(self, fake: FakeDecode, address: str) -> None:
        self._fake = fake
        self._address = address
        self.outgoing: asyncio.Queue[TokenFrame | TandemError | None] = asyncio.Queue()
        self._runs: dict[str, asyncio.Task[None]] = {}

    async def send(self, command: Command) -> None:
        await asyncio.sleep(STEP_S / 10)
        if isinstance(command, Cancel):
            self._fake.cancels.append(command.request_id)
            run = self._runs[command.request_id]
            run.cancel()
            if not self._fake.is_mute and not run.done():
                done = Done(command.request_id, CACHED_TOKENS, WORKER_RECEIPT)
                self.outgoing.put_nowait(TokenFrame(0, (done,)))
        else:
            self._fake.submits.append((self._address, command))
            if self._address in self._fake.draining:
                failed = Failed(command.request_id, HandedBack("this worker drains"))
                self.outgoing.put_nowait(TokenFrame(0, (failed,)))
                return
            self._runs[command.request_id] = asyncio.create_task(self._run(command))

    async def frames(self) -> AsyncIterator[TokenFrame]:
        while isinstance(frame := await self.outgoing.get(), TokenFrame):
            yield frame
        if frame is not None:
            raise frame

    async def close(self) -> None:
        for task in self._runs.values():
            task.cancel()
        await asyncio.gather(*self._runs.values(), return_exceptions=True)

    async def _run(self, submit: Submit) -> None:
        self._fake.running.add(submit.request_id)
        try:
            given = len(submit.token_ids) - submit.prompt_count
            drawn = [given + len(choice.token_ids) for choice in submit.so_far]
            going_on = [choice for choice, so_far in enumerate(submit.so_far) if not so_far.is_finished]
            while going_on and max(drawn[choice] for choice in going_on) < len(self._fake.answer):
                await asyncio.sleep(STEP_S)
                events: list[Event] = []
                for choice in list(going_on):
                    token_id = self._fake.answer[drawn[choice]]
                    drawn[choice] += 1
                    is_eos = token_id == self._fake.eos
                    is_last = drawn[choice] == submit.params.max_tokens
                    reason = FinishReason.STOP if is_eos else FinishReason.LENGTH if is_last else None
                    matched = token_id if is_eos else None
                    events.append(Delta(submit.request_id, choice, (Sampled(token_id),), reason, matched))
                    if reason:
                        going_on.remove(choice)
                if not going_on:
                    events.append(Done(submit.request_id, CACHED_TOKENS, WORKER_RECEIPT))
                self.outgoing.put_nowait(TokenFrame(max(drawn), tuple(events)))
            if going_on:
                await asyncio.Event().wait()
        finally:
            self._fake.running.discard(submit.request_id)
