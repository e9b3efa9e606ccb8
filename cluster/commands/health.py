"""`tandem health`: asks one process for its health, by whatever connection its port wants."""

from __future__ import annotations

from pathlib import Path

import grpc.aio
from grpc_health.v1 import health_pb2

from cluster.security.names import WORKER_NAME
from engine.errors import ConfigError, Unavailable
from kvtransfer.rpc_tls import Tls

CHECK = "/grpc.health.v1.Health/Check"


async def check_health(url: str, service: str, *, ca: bytes | None, certs: Path | None, timeout_s: float) -> None:
    """Prints SERVING. `certs`: a worker's, to show to a worker; `ca`: who signs what the gateway shows to clients;
    neither: plain text. Raises Unavailable for any other answer and for none, ConfigError for certificates that cannot
    be used."""
    async with _channel(url, ca, certs) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            check = channel.unary_unary(
                CHECK, health_pb2.HealthCheckRequest.SerializeToString, health_pb2.HealthCheckResponse.FromString
            )
            answer = await check(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                raise ConfigError(f"--service: got {service!r}, expected one that is served at {url}") from None
            raise Unavailable(f"--url {url}: no health from there: {error.details()}") from None
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise Unavailable(f"--url {url}: {service or 'the process'} is {status}")
    print(status)


def _channel(url: str, ca: bytes | None, certs: Path | None) -> grpc.aio.Channel:
    if certs is not None:
        # It says what its holder is, not where it runs.
        options = [("grpc.ssl_target_name_override", WORKER_NAME)]
        return grpc.aio.secure_channel(url, Tls(certs).channel_credentials(), options=options)
    if ca is not None:
        return grpc.aio.secure_channel(url, grpc.ssl_channel_credentials(ca))
    return grpc.aio.insecure_channel(url)
