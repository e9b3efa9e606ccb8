"""The door of the gateway, whichever way callers come: who they are, and whether they ask too often."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from cluster.gateway import Gateway
from cluster.security.caller import ANONYMOUS, Caller
from cluster.security.clients import Clients
from engine.errors import TandemError, Unauthenticated
from engine.refusal_log import RefusalLog

_log = logging.getLogger(__name__)


class Door:
    """Lets callers in, before their requests are read. `clients` says who calls; None: everybody may, and nobody is
    told apart."""

    def __init__(self, gateway: Gateway, clients: Clients | None) -> None:
        self._gateway = gateway
        self._clients = clients
        self._refusals = RefusalLog()

    @property
    def asks_who_calls(self) -> bool:
        return self._clients is not None

    def let_in(self, headers: Iterable[tuple[str, str | bytes]]) -> Caller:
        """Who a call is from. `headers`: names in lower case. Raises Unauthenticated, or Overloaded for a caller that
        is over its quota of calls."""
        caller = self._clients.caller(headers) if self._clients is not None else ANONYMOUS
        self._gateway.quotas.call(caller.tenant, asyncio.get_running_loop().time())
        return caller

    def tell(self, error: TandemError, peer: str) -> None:
        """Logs who was refused, where nobody knows them: quotas are counted instead."""
        if isinstance(error, Unauthenticated):
            line = self._refusals.line(peer, f"refused a call: {error.detail}", asyncio.get_running_loop().time())
            if line is not None:
                _log.warning("%s", line)
