"""What one worker shows to others, and what it asks of them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from cluster.security.names import GATEWAY_NAME, WORKER_NAME
from cluster.security.security_config import SecurityConfig
from cluster.security.tickets import Holder, TicketCheck
from kvtransfer.rpc_channel import Channels, KeepAlive
from kvtransfer.rpc_tls import Tls
from kvtransfer.transport import PrefillCall


def read_certs(folder: Path | None) -> Tls | None:
    """None where there is no encryption. Raises ConfigError."""
    return None if folder is None else Tls(folder)


class WorkerIdentity:
    """A worker's certificates, the key that it signs calls with, and its check of those that come. All of it is of one
    life of the worker."""

    def __init__(self, worker_id: str, incarnation: int, config: SecurityConfig) -> None:
        self.tls = read_certs(config.worker_certs)
        self.holder = Holder()
        self.tickets = TicketCheck(worker_id, incarnation)

    def check_call(self, call: PrefillCall, proof: bytes) -> None:
        self.tickets.check(call, proof, asyncio.get_running_loop().time())

    def channels_to_workers(self, keepalive: KeepAlive) -> Channels:
        return Channels(keepalive=keepalive, tls=self.tls, peer=WORKER_NAME if self.tls else "")

    def channels_to_gateway(self, keepalive: KeepAlive) -> Channels:
        return Channels(keepalive=keepalive, tls=self.tls, peer=GATEWAY_NAME if self.tls else "")
