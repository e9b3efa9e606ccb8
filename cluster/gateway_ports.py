"""Where the gateway is reached: a port for reports of workers, one for gRPC and one for HTTP.

told to end ─▶ NOT_SERVING, new requests are refused ─▶ those that run end, for `drain_s` ─▶ the rest is cut ─▶ closed
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

from cluster.config import TandemConfig
from cluster.door import Door
from cluster.gateway import Gateway
from cluster.gateway_config import GatewayConfig
from cluster.http.app import http_app
from cluster.http.server import HttpServer, start_http
from cluster.inference_server import inference_service
from cluster.kserve.server import kserve_service
from cluster.metrics.exposition import Metrics
from cluster.recorder import Recorder, recording
from cluster.registry_server import registry_service
from cluster.security.clients import Clients
from cluster.security.identity import read_certs
from cluster.security.names import WORKER_NAME
from kvtransfer.rpc_channel import KeepAlive
from kvtransfer.rpc_limits import CallLimits, PortLimits
from kvtransfer.rpc_server import RpcServer, start_server
from kvtransfer.rpc_tls import Tls

# For the last words of streams that were cut.
CLOSE_GRACE_S = 0.5
# Connections of clients that have nothing to say are closed after this.
IDLE_S = 300.0
# What may come beside a prompt in a request.
REQUEST_BYTES = 1 << 20
UTF8_BYTES_MAX = 4
# Several times what a worker's report may hold.
REPORT_BYTES = 1 << 20
# A request's own deadline, which names the phase, comes before the end of its call's time.
AGE_SLACK_S = 5.0


@dataclass(frozen=True, slots=True)
class Ports:
    """`grpc`: the server that clients call. `reports_to`: where workers report. `http`: where HTTP is served, "" for
    nowhere."""

    grpc: RpcServer
    reports_to: str
    http: str


@asynccontextmanager
async def gateway_ports(
    config: TandemConfig,
    host: str,
    gateway: Gateway,
    clients: Clients | None,
    tls: Tls | None,
    metrics: Metrics,
    is_ready: Callable[[], bool],
) -> AsyncIterator[Ports]:
    """Serves `gateway` on `host` and the configured ports while the context lasts. On leaving, what runs may end first,
    for `drain_s`. `tls` is what workers are shown. Raises ConfigError for a port that cannot be listened on."""
    limits = config.gateway
    keepalive = KeepAlive.within(config.cluster.lease_s)
    inference = inference_service(gateway, clients, max_prompt_chars=limits.max_prompt_chars)
    kserve = kserve_service(gateway, clients, is_ready)
    reports = replace(registry_service(gateway.heartbeat), caller=WORKER_NAME)
    async with AsyncExitStack() as stack:
        # A port of their own: clients cannot report as workers, and need no certificate where workers do.
        reports_to = await start_server(
            f"{host}:{config.cluster.reports_to_port}",
            [reports],
            keepalive=keepalive,
            limits=PortLimits(request_bytes=REPORT_BYTES),
            tls=tls,
        )
        stack.push_async_callback(reports_to.stop)
        server = await start_server(
            f"{host}:{config.cluster.grpc_port}",
            [service.within(call_limits(limits)) for service in (inference, kserve)],
            ready=False,
            keepalive=keepalive,
            limits=port_limits(limits),
            tls=read_certs(config.security.client_certs),
            mutual=False,
        )
        # Not for long: streams of health watchers never end by themselves.
        stack.push_async_callback(server.stop, CLOSE_GRACE_S)
        http = None
        if config.cluster.http:
            recorder = await stack.enter_async_context(recording(gateway))
            http = await _start_http(config, host, gateway, recorder, clients, metrics, is_ready)
            stack.push_async_callback(http.stop, CLOSE_GRACE_S)
        try:
            yield Ports(server, reports_to.address, http.address if http is not None else "")
        finally:
            await server.set_ready(False)
            await gateway.drain(config.cluster.drain_s)


async def _start_http(
    config: TandemConfig,
    host: str,
    gateway: Gateway,
    recorder: Recorder,
    clients: Clients | None,
    metrics: Metrics,
    is_ready: Callable[[], bool],
) -> HttpServer:
    limits = config.gateway
    app = http_app(
        gateway,
        Door(gateway, clients),
        metrics,
        recorder,
        max_prompt_chars=limits.max_prompt_chars,
        max_body_bytes=port_limits(limits).request_bytes,
        is_ready=is_ready,
        wall_clock=time.time,
    )
    address = f"{host}:{config.cluster.http_listens_on}"
    tls = read_certs(config.security.client_certs)
    return await start_http(address, app, slow_reader_s=limits.slow_reader_s, tls=tls)


def call_limits(limits: GatewayConfig) -> CallLimits:
    """Of clients' calls."""
    return CallLimits(write_s=limits.slow_reader_s, age_s=limits.max_stream_s + AGE_SLACK_S)


def port_limits(limits: GatewayConfig) -> PortLimits:
    """Of the port for clients."""
    return PortLimits(request_bytes=UTF8_BYTES_MAX * limits.max_prompt_chars + REQUEST_BYTES, idle_s=IDLE_S)
