"""Which protocol two parts of Tandem speak, said in the headers of every call between them.

    caller ── tandem-protocol: 1-2 ──▶ server      nothing in common: the server refuses, and names both
    caller ◀─ tandem-protocol: 2-3 ─── server      or the caller does: a server from before this was said is version 1

The number is of what calls mean and in which order they come. It stays as it is when a message gets one more field,
which whoever does not know it passes over, or a KV frame's header one more key; a KV frame's own form is named by its
first bytes (frames.py), and what the KV inside is made of by its layout. Clients' calls say nothing, and are asked
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import grpc.aio

from engine.errors import VersionMismatch

KEY = "tandem-protocol"


@dataclass(frozen=True, slots=True)
class Versions:
    """All numbers from `first` to `last`."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What to send with a call, or with its answer."""
        return ((KEY, str(self)),)

    def agree(self, metadata: Iterable[tuple[str, str | bytes]] | None, peer: str, own: str) -> int:
        """The highest number that both know, by what `peer` has sent to `own`. Raises VersionMismatch."""
        theirs = _said(metadata or (), peer)
        common = min(self.last, theirs.last)
        if common < max(self.first, theirs.first):
            older = own if self.last < theirs.first else peer
            raise VersionMismatch(
                f"{peer} speaks versions {theirs} of Tandem's protocol, {own} {self}: upgrade {older}, which is older"
            )
        return common


# What this release speaks.
SPOKEN = Versions(1, 1)
# Who says nothing is from before this was said.
UNSAID = Versions(1, 1)


async def agree_with_server(rpc: grpc.aio.Call, spoken: Versions, server: str) -> None:
    """Waits for the first word of `server` (what to call it) in answer to `rpc`. Raises VersionMismatch."""
    spoken.agree(await rpc.initial_metadata(), server, "its caller")


async def agree_with_caller(context: grpc.aio.ServicerContext[Any, Any], spoken: Versions, method: str) -> None:
    """The same on the server's side, which says then what it speaks. Raises VersionMismatch."""
    spoken.agree(context.invocation_metadata(), f"the caller of {method}", "the server")
    await context.send_initial_metadata(spoken.metadata)


def _said(metadata: Iterable[tuple[str, str | bytes]], peer: str) -> Versions:
    for key, value in metadata:
        if key == KEY:
            first, dash, last = str(value).partition("-")
            if not (dash and first.isdecimal() and last.isdecimal()):
                raise VersionMismatch(f"{peer} speaks {value!r} of the protocol, which is no range of versions")
            return Versions(int(first), int(last))
    return UNSAID
