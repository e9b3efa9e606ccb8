"""KServe's service in front of the real gateway and a fake decode worker, over real gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import pytest
from tandem.kserve import open_inference_pb2 as pb
from tandem.kserve.open_inference_pb2_grpc import GRPCInferenceServiceStub

from cluster.gateway import Gateway
from cluster.gateway_config import GatewayConfig
from cluster.kserve.server import STREAM_IDLE_S, kserve_service
from cluster.security.clients import Clients
from engine.errors import TandemError
from kvtransfer.rpc import error_from_rpc
from kvtransfer.rpc_channel import Channels
from kvtransfer.rpc_server import start_server
from tests.cluster.fake_decode import FakeDecode
from tests.cluster.serving import ANSWER, CONFIG, LENGTH
from tests.cluster.serving import serving as serving_gateway

Values = Sequence[Any]
FIELDS = {
    "BYTES": "bytes_contents",
    "BOOL": "bool_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}


@dataclass
class Service:
    """A served gateway, and a client of the published protocol."""

    address: str
    stub: Any
    gateway: Gateway
    fake: FakeDecode

    async def refusal(self, request: pb.ModelInferRequest, **options: Any) -> tuple[grpc.StatusCode, TandemError]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.stub.ModelInfer(request, timeout=20, **options)
        return caught.value.code(), error_from_rpc(caught.value)


@asynccontextmanager
async def serving(
    answer: Sequence[int] = ANSWER,
    *,
    is_ready: bool = True,
    config: GatewayConfig = CONFIG,
    clients: Clients | None = None,
    stream_idle_s: float = STREAM_IDLE_S,
) -> AsyncIterator[Service]:
    """On leaving, nothing may be held anywhere."""
    fake = FakeDecode(list(answer))
    async with serving_gateway(fake, config=config) as gateway:
        service = kserve_service(gateway, clients, lambda: is_ready, stream_idle_s=stream_idle_s)
        server = await start_server("127.0.0.1:0", [service])
        channels = Channels()
        try:
            stub = GRPCInferenceServiceStub(channels.get(server.address))
            yield Service(server.address, stub, gateway, fake)
        finally:
            await channels.close()
            await server.stop()


def tensor(name: str, datatype: str, *values: Any, shape: Sequence[int] = ()) -> Any:
    contents = pb.InferTensorContents(**{FIELDS[datatype]: values})
    return pb.ModelInferRequest.InferInputTensor(
        name=name, datatype=datatype, shape=shape or [len(values)], contents=contents
    )


def parameter(value: Any) -> pb.InferParameter:
    kind = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}[type(value)]
    return pb.InferParameter(**{kind: value})


def request(*inputs: Any, text: str | None = "hello", **parameters: Any) -> pb.ModelInferRequest:
    parameters.setdefault("max_tokens", LENGTH)
    prompt = [] if text is None else [tensor("text_input", "BYTES", text.encode())]
    given = {name: parameter(value) for name, value in parameters.items() if value is not None}
    return pb.ModelInferRequest(model_name="tiny", id="mine", inputs=[*prompt, *inputs], parameters=given)


def values(response: pb.ModelInferResponse, name: str) -> list[Any]:
    """The elements of an output that came typed."""
    (output,) = (output for output in response.outputs if output.name == name)
    ((_, elements),) = output.contents.ListFields() or ((None, []),)
    assert list(output.shape) == [len(elements)]
    return [each.decode() if isinstance(each, bytes) else each for each in elements]
