"""What reaches the decode loop by its inbox, beside what pulls tell it (pull.py)."""

from __future__ import annotations

from dataclasses import dataclass

from decode_worker.pull import News
from decode_worker.session import Session
from decode_worker.stream import Command
from engine.errors import TandemError


@dataclass(frozen=True, slots=True)
class FromGateway:
    session: Session
    command: Command


@dataclass(frozen=True, slots=True)
class Expire:
    """A request's deadline has passed."""

    key: str


@dataclass(frozen=True, slots=True)
class Detach:
    """A gateway's stream has ended."""

    session: Session


@dataclass(frozen=True, slots=True)
class Drain:
    """The worker is to give back what it has not begun; with an `error`, whatever is here ends with it."""

    error: TandemError | None = None


Message = FromGateway | Expire | Detach | Drain | News
