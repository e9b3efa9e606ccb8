"""Reading one gateway's commands into the loop's inbox."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable

from decode_worker.messages import FromGateway, Message
from decode_worker.session import Session
from decode_worker.stream import Cancel, Failed, Received, Unreadable
from engine.errors import TandemError
from engine.inbox import Inbox

logger = logging.getLogger(__name__)


async def read_commands(
    session: Session, commands: AsyncIterator[Received], inbox: Inbox[Message], steps: Callable[[], int]
) -> None:
    """Until they end, or break; then closes the session, with what they broke by. `steps` counts the steps so far, for
    what is refused here."""
    problem: TandemError | None = None
    try:
        async for command in commands:
            await session.room()
            if isinstance(command, Unreadable):
                session.push(steps(), [Failed(command.request_id, command.error)])
                continue
            try:
                inbox.offer(FromGateway(session, command))
            except TandemError as error:
                # A cancel is about accepted work and must never be lost; only new work may be refused.
                if isinstance(command, Cancel):
                    inbox.put(FromGateway(session, command))
                else:
                    session.push(steps(), [Failed(command.request_id, error)])
    except TandemError as error:
        problem = error
        logger.info("token stream %s broke: %s", session.name, error)
    finally:
        session.close(problem)
