"""`tandem.v1.Registry` on gRPC: workers report to a gateway by it. Both ends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeAlias, cast

import grpc
import grpc.aio
from tandem.v1 import worker_pb2

from cluster.registry import HeartbeatReply, KVEvents, Role, WorkerReport
from engine.errors import InvalidArgument, Unavailable
from engine.stats import LoopStats
from kvtransfer.rpc import rpc_errors
from kvtransfer.rpc_channel import Channels
from kvtransfer.rpc_server import RpcService
from kvtransfer.rpc_version import SPOKEN, Versions, agree_with_server

DESCRIPTOR = worker_pb2.DESCRIPTOR.services_by_name["Registry"]
METHOD = "/tandem.v1.Registry/Heartbeat"
INTERVAL_MAX_S = 3600.0
# How far a worker's clock may be ahead of the gateway's: its incarnation is the time at which it began.
CLOCKS_APART_NS = 3600 * 10**9
Heartbeat: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[worker_pb2.WorkerStats, worker_pb2.HeartbeatReply]"

_STATS = tuple(LoopStats.__dataclass_fields__)


def registry_service(take: Callable[[WorkerReport], HeartbeatReply]) -> RpcService:
    """`tandem.v1.Registry`, to be handed to `start_server`. `take` (Gateway.heartbeat) gets each report and answers
    it; what it raises goes back to the worker."""

    async def heartbeat(
        message: worker_pb2.WorkerStats, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.HeartbeatReply:
        if message.incarnation > time.time_ns() + CLOCKS_APART_NS:
            raise InvalidArgument("incarnation", message.incarnation, "a time in the past: do the clocks differ?")
        reply = take(report_from_proto(message))
        return worker_pb2.HeartbeatReply(**asdict(reply))

    handler = grpc.unary_unary_rpc_method_handler(
        heartbeat,
        request_deserializer=worker_pb2.WorkerStats.FromString,
        response_serializer=worker_pb2.HeartbeatReply.SerializeToString,
    )
    return RpcService(DESCRIPTOR, {"Heartbeat": handler}, is_internal=True)


async def send_heartbeat(
    channels: Channels, gateway: str, report: WorkerReport, timeout_s: float = 5.0, spoken: Versions = SPOKEN
) -> HeartbeatReply:
    """Reports once; returns the gateway's answer. Raises TandemErrors only.

    With channels and address bound to it, this is the `send` of cluster.heartbeat.report_forever.
    """
    heartbeat: Heartbeat = channels.get(gateway).unary_unary(
        METHOD,
        request_serializer=worker_pb2.WorkerStats.SerializeToString,
        response_deserializer=worker_pb2.HeartbeatReply.FromString,
    )
    async with rpc_errors():
        call = heartbeat(report_to_proto(report), timeout=timeout_s, metadata=spoken.metadata)
        reply = await call
        await agree_with_server(call, spoken, "the gateway")
    return reply_from_proto(reply)


def reply_from_proto(reply: worker_pb2.HeartbeatReply) -> HeartbeatReply:
    """Raises Unavailable for an answer that no gateway of this version gives."""
    if not 0 < reply.interval_s <= INTERVAL_MAX_S:
        raise Unavailable(f"the gateway asks for a report every {reply.interval_s} s")
    if reply.role not in ("", "prefill", "decode"):
        raise Unavailable(f"the gateway asks for the role {reply.role!r}")
    if not math.isfinite(reply.now_s):
        raise Unavailable(f"the gateway says that it is {reply.now_s} s")
    return HeartbeatReply(
        reply.interval_s,
        cast(Role, reply.role),
        reply.kv_resync,
        reply.on_its_way,
        ticket_key=reply.ticket_key,
        now_s=reply.now_s,
    )


def report_to_proto(report: WorkerReport) -> worker_pb2.WorkerStats:
    stats = {name: getattr(report.stats, name) for name in _STATS}
    return worker_pb2.WorkerStats(
        worker_id=report.worker_id,
        role=report.role,
        address=report.address,
        incarnation=report.incarnation,
        model=report.model,
        links=[worker_pb2.LinkRate(prefill_address=to, bytes_per_s=rate) for to, rate in report.links],
        kv_events=_events_to_proto(report.kv_events),
        public_key=report.public_key,
        **stats,
    )


def report_from_proto(message: worker_pb2.WorkerStats) -> WorkerReport:
    """The registry checks the values, the role among them."""
    stats = {name: getattr(message, name) for name in _STATS}
    # A worker without a cost model of its own says nothing of these.
    stats["prefill_scale"] = message.prefill_scale or 1.0
    stats["decode_scale"] = message.decode_scale or 1.0
    return WorkerReport(
        worker_id=message.worker_id,
        role=cast(Role, message.role),
        address=message.address,
        incarnation=message.incarnation,
        model=message.model,
        stats=LoopStats(**stats),
        links=tuple((link.prefill_address, link.bytes_per_s) for link in message.links),
        kv_events=_events_from_proto(message.kv_events) if message.HasField("kv_events") else None,
        public_key=message.public_key,
    )


def _events_to_proto(events: KVEvents | None) -> worker_pb2.KVEvents | None:
    if events is None:
        return None
    return worker_pb2.KVEvents(
        sequence=events.sequence, is_snapshot=events.is_snapshot, stored=events.stored, evicted=events.evicted
    )


def _events_from_proto(message: worker_pb2.KVEvents) -> KVEvents:
    return KVEvents(message.sequence, message.is_snapshot, tuple(message.stored), tuple(message.evicted))
