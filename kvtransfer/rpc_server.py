"""A gRPC server with what every Tandem server has: health, reflection, one mapping of errors, and sane limits.

server = await start_server("127.0.0.1:0", [prefill_service(worker)])
print(server.address)
await server.stop(grace_s=5)
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection

from engine.errors import ConfigError
from kvtransfer.rpc_channel import FLOW, KEEP_ALIVE, Flow, KeepAlive, common_options
from kvtransfer.rpc_handlers import RpcHandlers, ServiceRules
from kvtransfer.rpc_limits import CALL_LIMITS, CallLimits, PortLimits
from kvtransfer.rpc_tls import Tls
from kvtransfer.rpc_version import SPOKEN, Versions

PORT_LIMITS = PortLimits()
# How long `stop` waits for handlers that were cancelled to have cleaned up.
CLEANUP_S = 10.0
# The health service's name for "the event loop turns": whoever answers is alive.
LIVENESS = "liveness"
# The least grace: without any, gRPC breaks connections off, and their other ends print that as an error.
FAREWELL_S = 0.05

Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
# Chooses the handler of one call by its metadata, before its request is read.
Chooser: TypeAlias = Callable[[Metadata], Handler]


@dataclass(frozen=True, slots=True)
class RpcService:
    """One service: its descriptor; for each of its methods a handler, or what chooses one for each call; how long calls
    may take; who may make them where callers show certificates: those of theirs that name `caller`, "" for any; and
    `is_internal` where callers are other parts of Tandem, and agree with it on a version of the protocol."""

    descriptor: ServiceDescriptor
    handlers: Mapping[str, Handler | Chooser]
    limits: CallLimits = CALL_LIMITS
    caller: str = ""
    is_internal: bool = False

    def __post_init__(self) -> None:
        missing = {method.name for method in self.descriptor.methods} ^ set(self.handlers)
        assert not missing, f"{self.descriptor.full_name}: handlers and methods differ in {missing}"

    @property
    def name(self) -> str:
        return self.descriptor.full_name

    def within(self, limits: CallLimits) -> RpcService:
        """The same service with other limits."""
        return replace(self, limits=limits)


class _Methods(grpc.GenericRpcHandler):
    """Finds the handlers of a service's calls for gRPC."""

    def __init__(self, service: RpcService) -> None:
        self._handlers = {f"/{service.name}/{method}": handler for method, handler in service.handlers.items()}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        handler = self._handlers.get(handler_call_details.method)
        if handler is None or isinstance(handler, grpc.RpcMethodHandler):
            return handler
        return handler(handler_call_details.invocation_metadata)


class RpcServer:
    """A running server. Made by `start_server`."""

    def __init__(
        self,
        server: grpc.aio.Server,
        address: str,
        names: Sequence[str],
        health_servicer: health.HealthServicer,
        handlers: RpcHandlers,
    ) -> None:
        self.address = address
        self.service_names = tuple(names)
        self._server = server
        self._health = health_servicer
        self._handlers = handlers

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    async def set_ready(self, ready: bool, service: str | None = None) -> None:
        """What the health service says about `service`, or about all of them and "", the server as a whole."""
        names = ("", *self.service_names) if service is None else (service,)
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in names:
            assert name in ("", *self.service_names), f"{name} is not served here"
            await self._health.set(name, status)

    async def stop(self, grace_s: float = 0.0) -> None:
        """Refuses new calls, lets running ones finish for `grace_s`, cancels the rest and waits for their cleanup."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(max(grace_s, FAREWELL_S))
        await self._handlers.drain(CLEANUP_S)

    async def wait(self) -> None:
        """Until the server has stopped."""
        await self._server.wait_for_termination()


async def start_server(
    address: str,
    services: Sequence[RpcService],
    *,
    ready: bool = True,
    keepalive: KeepAlive = KEEP_ALIVE,
    flow: Flow = FLOW,
    limits: PortLimits = PORT_LIMITS,
    tls: Tls | None = None,
    mutual: bool = True,
    spoken: Versions = SPOKEN,
) -> RpcServer:
    """Serves `services` on `address` ("host:port", port 0 for any free one).

    The standard health service answers SERVING for LIVENESS, and for "" and each full service name while the server is
    ready (when `ready` is false: not before `set_ready(True)`). With `tls` connections are encrypted, and, unless they
    need not be `mutual`, made only by callers with a certificate of the same CA; each service then has the callers that
    it names. Raises ConfigError naming the address when it cannot be listened on.
    """
    host, port = _split(address)
    is_mutual = tls is not None and mutual
    rules = {
        service.name: ServiceRules(service.limits, service.caller if is_mutual else "", service.is_internal)
        for service in services
    }
    handlers = RpcHandlers(limits, rules, spoken)
    server = grpc.aio.server(
        interceptors=[handlers],
        options=[
            *common_options(keepalive, flow),
            *limits.options(),
            # Without this a second server on a taken port would start, and get half of the calls.
            ("grpc.so_reuseport", 0),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 400),
        ],
    )
    names = [service.name for service in services]
    server.add_generic_rpc_handlers(tuple(map(_Methods, services)))
    health_servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection(
        [*names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME], server
    )
    try:
        if tls is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, tls.server_credentials(require_client=mutual))
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {address}: {_why_not(host, port)}") from error
    await server.start()
    running = RpcServer(server, f"{host}:{port}", names, health_servicer, handlers)
    await health_servicer.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
    await running.set_ready(ready)
    return running


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    # Checked here because gRPC takes a larger number modulo 65536.
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"cannot listen on {address!r}: expected host:port with a port in [0, 65535]")
    return host, int(port)


def _why_not(host: str, port: int) -> str:
    """The operating system's words for why a port cannot be listened on; gRPC does not pass them on."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            probe.listen(1)
    except OSError as error:
        return f"port {port}: {error.strerror}"
    return f"port {port} is taken or not allowed"
