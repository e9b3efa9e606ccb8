"""`tandem.v1.Registry` on gRPC: workers report to a gateway by it. Both ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import grpc
import grpc.aio
from tandem.v1 import worker_pb2

from cluster.registry import HeartbeatReply, KVEvents, Role, WorkerReport
from engine.errors import Unavailable
from engine.stats import LoopStats
from kvtransfer.rpc import rpc_errors
from kvtransfer.rpc_server import RpcService

DESCRIPTOR = worker_pb2.DESCRIPTOR.services_by_name["Registry"]
METHOD = "/tandem.v1.Registry/Heartbeat"
INTERVAL_MAX_S = 3600.0
Heartbeat: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[worker_pb2.WorkerStats, worker_pb2.HeartbeatReply]"

_STATS = tuple(LoopStats.__dataclass_fields__)


def registry_service(take: Callable[[WorkerReport], HeartbeatReply]) -> RpcService:
    """`tandem.v1.Registry`, to be handed to `start_server`. `take` (Gateway.heartbeat) gets each report and answers
    it; what it raises goes back to the worker."""

    async def heartbeat(
        message: worker_pb2.WorkerStats, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.HeartbeatReply:
        reply = take(report_from_proto(message))
        return worker_pb2.HeartbeatReply(interval_s=reply.interval_s, role=reply.role, kv_resync=reply.kv_resync)

    handler = grpc.unary_unary_rpc_method_handler(
        heartbeat,
        request_deserializer=worker_pb2.WorkerStats.FromString,
        response_serializer=worker_pb2.HeartbeatReply.SerializeToString,
    )
    return RpcService(DESCRIPTOR, {"Heartbeat": handler})


async def send_heartbeat(channel: grpc.aio.Channel, report: WorkerReport, timeout_s: float = 5.0) -> HeartbeatReply:
    """Reports once; returns the gateway's answer. Raises TandemErrors only.

    With a channel bound to it, this is the `send` of cluster.heartbeat.report_forever.
    """
    heartbeat: Heartbeat = channel.unary_unary(
        METHOD,
        request_serializer=worker_pb2.WorkerStats.SerializeToString,
        response_deserializer=worker_pb2.HeartbeatReply.FromString,
    )
    async with rpc_errors():
        reply = await heartbeat(report_to_proto(report), timeout=timeout_s)
    if not 0 < reply.interval_s <= INTERVAL_MAX_S:
        raise Unavailable(f"the gateway asks for a report every {reply.interval_s} s")
    if reply.role not in ("", "prefill", "decode"):
        raise Unavailable(f"the gateway asks for the role {reply.role!r}")
    return HeartbeatReply(reply.interval_s, cast(Role, reply.role), reply.kv_resync)


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
    )


def _events_to_proto(events: KVEvents | None) -> worker_pb2.KVEvents | None:
    if events is None:
        return None
    return worker_pb2.KVEvents(
        sequence=events.sequence, is_snapshot=events.is_snapshot, stored=events.stored, evicted=events.evicted
    )


def _events_from_proto(message: worker_pb2.KVEvents) -> KVEvents:
    return KVEvents(message.sequence, message.is_snapshot, tuple(message.stored), tuple(message.evicted))
