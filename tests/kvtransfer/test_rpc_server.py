"""What every Tandem server has: health, reflection, a clear error for a taken port, and an end that waits."""

import asyncio
import socket
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from engine.errors import ConfigError, Unauthenticated
from kvtransfer.rpc_channel import Channels
from kvtransfer.rpc_handlers import refusal
from kvtransfer.rpc_limits import PortLimits
from kvtransfer.rpc_server import RpcService, start_server
from prefill_worker.server import DESCRIPTOR, prefill_service

PREFILL = "tandem.v1.PrefillWorker"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Silent:
    """A PrefillService that never answers, and needs a moment to clean up."""

    def __init__(self) -> None:
        self.cleaned = False

    async def prefill(self, call):
        try:
            await asyncio.Event().wait()
            yield
        finally:
            await asyncio.sleep(0.05)
            self.cleaned = True


@asynccontextmanager
async def serving(**options):
    """A server and a channel to it."""
    server = await start_server("127.0.0.1:0", [prefill_service(Silent())], **options)
    channels = Channels()
    try:
        yield server, channels.get(server.address)
    finally:
        await channels.close()
        await server.stop()


async def health(channel, service: str) -> int:
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    return (await check(health_pb2.HealthCheckRequest(service=service))).status


async def test_health_tells_live_from_ready():
    async with serving() as (server, channel):
        for service in ("liveness", "", PREFILL):
            assert await health(channel, service) == SERVING
        await server.set_ready(False)
        assert await health(channel, "liveness") == SERVING
        assert await health(channel, "") == NOT_SERVING
        assert await health(channel, PREFILL) == NOT_SERVING
        await server.set_ready(True, PREFILL)
        assert await health(channel, PREFILL) == SERVING
        assert await health(channel, "") == NOT_SERVING


async def test_a_server_can_start_unready():
    async with serving(ready=False) as (_, channel):
        assert await health(channel, "liveness") == SERVING
        assert await health(channel, "") == NOT_SERVING
        assert await health(channel, PREFILL) == NOT_SERVING


async def reflect(channel, **question) -> reflection_pb2.ServerReflectionResponse:
    ask = channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    call = ask(iter([reflection_pb2.ServerReflectionRequest(**question)]))
    return await anext(aiter(call))


async def test_reflection_lists_the_services_and_gives_their_files():
    async with serving() as (_, channel):
        listed = (await reflect(channel, list_services="")).list_services_response.service
        answer = await reflect(channel, file_containing_symbol=PREFILL)
    assert {service.name for service in listed} >= {PREFILL, "grpc.health.v1.Health"}
    files = [
        descriptor_pb2.FileDescriptorProto.FromString(raw)
        for raw in answer.file_descriptor_response.file_descriptor_proto
    ]
    # A foreign client builds its calls out of these files alone.
    pool, left = DescriptorPool(), {file.name: file for file in files}
    assert "tandem/v1/prefill.proto" in left
    while left:
        ready = [file for file in left.values() if not set(file.dependency) & left.keys()]
        for file in ready:
            pool.Add(left.pop(file.name))
    assert pool.FindServiceByName(PREFILL).methods_by_name["Prefill"].server_streaming


async def test_two_servers_on_one_port():
    async with serving() as (server, _):
        assert server.port > 0
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{server.port}: port {server.port}: Address already in use"):
            await start_server(server.address, [prefill_service(Silent())])


async def test_a_port_taken_by_something_else():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=str(port)):
            await start_server(f"127.0.0.1:{port}", [prefill_service(Silent())])


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "127.0.0.1:http!", "nowhere.invalid:1"])
async def test_an_address_that_makes_no_sense(address):
    with pytest.raises(ConfigError, match=address.replace(".", r"\.")):
        await start_server(address, [prefill_service(Silent())])


async def test_stop_waits_for_the_handlers_cleanup():
    service = Silent()
    server = await start_server("127.0.0.1:0", [prefill_service(service)])
    channels = Channels()
    call = channels.get(server.address).unary_stream(f"/{PREFILL}/Prefill")(b"")
    await asyncio.sleep(0.05)
    await server.stop()
    assert service.cleaned
    call.cancel()
    await channels.close()


async def test_a_handler_can_be_chosen_for_each_call_by_its_metadata(caplog):
    """A refusal comes before the request is read; a bug in choosing is hidden and logged as one in a handler is."""
    (plain,) = prefill_service(Silent()).handlers.values()

    def choose(metadata):
        match dict(metadata).get("who"):
            case "known":
                return plain
            case "broken":
                raise ZeroDivisionError("the secret is 42")
        return refusal(Unauthenticated("nobody knows you", ""), peers.append)

    async def error(**metadata):
        call = channels.get(server.address).unary_unary(f"/{PREFILL}/Prefill")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"\xff" * 1000, metadata=tuple(metadata.items()), timeout=5)
        return caught.value.code(), caught.value.details()

    peers: list[str] = []
    limits = PortLimits(request_bytes=2000)
    server = await start_server("127.0.0.1:0", [RpcService(DESCRIPTOR, {"Prefill": choose})], limits=limits)
    channels = Channels()
    assert (await error(who="known"))[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert await error() == (grpc.StatusCode.UNAUTHENTICATED, "nobody knows you")
    assert [peer.rpartition(":")[0] for peer in peers] == ["ipv4:127.0.0.1"]
    assert await error(who="broken") == (grpc.StatusCode.INTERNAL, "internal error")
    assert [record.exc_info is not None for record in caplog.records] == [False, True]
    await channels.close()
    await server.stop()


def test_services_must_be_complete():

    with pytest.raises(AssertionError, match="Prefill"):
        RpcService(DESCRIPTOR, {})
