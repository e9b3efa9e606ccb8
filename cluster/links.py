"""The gateway's links to decode workers: one token stream to each, shared by all requests that run there.

    submit() ─ Submit ─▶ outbox ─▶ writer ─▶ session ─▶ worker
    mailbox ◀─ events ─────────── reader ◀─ session ◀─ one frame per step

A link opens with the first request for its address. When it breaks, for whatever reason, each of its requests gets
Failed(Unavailable), and the next request opens it anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

from decode_worker.stream import Cancel, Command, DecodeSession, DecodeTransport, Done, Event, Failed, Submit
from engine.errors import TandemError, Unavailable
from engine.refusal_log import RefusalLog

_log = logging.getLogger(__name__)

# What requests are told that the end of the gateway cuts short, and those that come too late.
SHUTTING_DOWN = "the gateway is shutting down"


class DecodeLinks:
    """Runs requests on decode workers by address."""

    def __init__(self, transport: DecodeTransport) -> None:
        self._transport = transport
        self._links: dict[str, _Link] = {}
        self._refusals = RefusalLog()
        self._submit_count = 0
        self.is_closed = False

    @asynccontextmanager
    async def submit(
        self,
        address: str,
        submit: Submit,
        notice: Callable[[Event], None] | None = None,
        ticket: Callable[[Submit], bytes] | None = None,
    ) -> AsyncIterator[Mailbox]:
        """Starts a request and yields its events, which end with Done or Failed; `notice` gets each when it comes,
        however late it is read. A TandemError that it raises breaks the link: who says what nobody asked for is not
        to be believed in anything. Leaving the context earlier cancels the request; neither entering nor leaving ever
        waits. Raises Unavailable after `close`.

        On the wire the request's id gets a number, so that what an earlier request of the same id left behind is not
        taken for this one's. Its events carry that id, and `ticket` makes its ticket for that one.
        """
        if self.is_closed:
            raise Unavailable(SHUTTING_DOWN)
        link = self._links.get(address)
        if link is None or link.is_broken:
            link = self._links[address] = _Link(self._transport, address, self._refused, self._forget)
        self._submit_count += 1
        submit = replace(submit, request_id=f"{submit.request_id}#{self._submit_count}")
        if ticket is not None:
            submit = replace(submit, ticket=ticket(submit))
        mailbox = link.start(submit, Mailbox(notice, partial(link.cancel, submit)))
        try:
            yield mailbox
        finally:
            link.leave(submit)

    async def close(self) -> None:
        """Ends every link; requests still running get Failed(Unavailable)."""
        self.is_closed = True
        await asyncio.gather(*(link.close() for link in list(self._links.values())))

    def _refused(self, address: str, error: TandemError) -> None:
        line = self._refusals.line(
            address, "decode worker was not believed", asyncio.get_running_loop().time(), str(error)
        )
        if line is not None:
            _log.warning("%s", line)

    def _forget(self, link: _Link) -> None:
        """It is over. A worker that comes back mostly has another address."""
        if self._links.get(link.address) is link:
            del self._links[link.address]


class Mailbox:
    """Events of one request on their way to its reader.

    Bounded by the request itself: at most one event per token it may draw (n × max_tokens), one for the end of each
    choice and one for its own, as long as `notice` refuses what goes beyond.
    After `expire` the reader still gets what is here, then TimeoutError: one timer for a whole request, instead of one
    around each of its waits. `came_s`: when the event that was read last came, however late its reader took it.
    `cancel` has the worker stop now; Done still comes, where the worker is there to say it.
    """

    def __init__(
        self, notice: Callable[[Event], None] | None = None, cancel: Callable[[], None] = lambda: None
    ) -> None:
        self._notice = notice
        self.cancel = cancel
        self._events: deque[tuple[Event, float]] = deque()
        self.came_s = 0.0
        self._arrived = asyncio.Event()
        self._is_late = False
        self.is_cancelled = False
        self.has_ended = False

    def put(self, event: Event) -> None:
        if self.has_ended:
            return
        if self._notice is not None:
            self._notice(event)
        self.has_ended = isinstance(event, Done | Failed)
        self._events.append((event, asyncio.get_running_loop().time()))
        self._arrived.set()

    def expire(self) -> None:
        self._is_late = True
        self._arrived.set()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self.has_ended:
                raise StopAsyncIteration
            if self._is_late:
                raise TimeoutError
            self._arrived.clear()
            await self._arrived.wait()
        event, self.came_s = self._events.popleft()
        return event


class _Link:
    """One token stream, from its opening to its end; never reopened.

    The outbox holds at most two commands for each request that was sent or is to be sent, so it is bounded by the
    gateway's admission as long as the worker ends what it was told to cancel.
    """

    def __init__(
        self,
        transport: DecodeTransport,
        address: str,
        refused: Callable[[str, TandemError], None],
        ended: Callable[[_Link], None],
    ) -> None:
        self.address = address
        self._transport = transport
        self._refused = refused
        self._ended = ended
        self._mailboxes: dict[str, Mailbox] = {}
        self._outbox: deque[Command] = deque()
        self._has_mail = asyncio.Event()
        self.is_broken = False
        self._task = asyncio.create_task(self._run())

    def start(self, submit: Submit, mailbox: Mailbox) -> Mailbox:
        self._mailboxes[submit.request_id] = mailbox
        self._post(submit)
        return mailbox

    def leave(self, submit: Submit) -> None:
        """Forgets a request, and cancels it where it has not ended."""
        self.cancel(submit)
        del self._mailboxes[submit.request_id]

    def cancel(self, submit: Submit) -> None:
        """Has the worker drop a request, where it has not ended and was not cancelled before."""
        mailbox = self._mailboxes[submit.request_id]
        if mailbox.has_ended or mailbox.is_cancelled or self.is_broken:
            return
        mailbox.is_cancelled = True
        if submit in self._outbox:
            self._outbox.remove(submit)
        else:
            self._post(Cancel(submit.request_id))

    def _post(self, command: Command) -> None:
        self._outbox.append(command)
        self._has_mail.set()

    async def close(self) -> None:
        self._fail(Unavailable(SHUTTING_DOWN))
        self._task.cancel()
        await asyncio.wait([self._task])

    def _break(self, problem: str) -> None:
        self._fail(Unavailable(f"lost the decode worker at {self.address}: {problem}"))

    def _fail(self, error: Unavailable) -> None:
        """Ends what runs here. Only the first call's `error` reaches the requests."""
        self.is_broken = True
        self._outbox.clear()
        for request_id, mailbox in self._mailboxes.items():
            mailbox.put(Failed(request_id, error))

    async def _run(self) -> None:
        try:
            async with self._transport.attach(self.address) as session:
                try:
                    await self._pump(session)
                except TandemError as error:
                    self._break(str(error))
                finally:
                    # Before the session is left, which may take its time: nobody is to join a link that is gone.
                    self._break("its token stream ended")
        except TandemError as error:
            self._break(str(error))
        finally:
            self._break("its token stream ended")
            self._ended(self)

    async def _pump(self, session: DecodeSession) -> None:
        """Reads and writes until either ends; raises what it ended with."""
        reader = asyncio.create_task(self._read(session))
        writer = asyncio.create_task(self._write(session))
        try:
            await asyncio.wait([reader, writer], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (reader, writer):
                task.cancel()
            results = await asyncio.gather(reader, writer, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _read(self, session: DecodeSession) -> None:
        async for frame in session.frames():
            for event in frame.events:
                # A request that was left may still be in frames that were on their way.
                mailbox = self._mailboxes.get(event.request_id)
                if mailbox is None:
                    continue
                try:
                    mailbox.put(event)
                except TandemError as error:
                    self._refused(self.address, error)
                    raise

    async def _write(self, session: DecodeSession) -> None:
        while True:
            while self._outbox:
                await session.send(self._outbox.popleft())
            self._has_mail.clear()
            await self._has_mail.wait()
