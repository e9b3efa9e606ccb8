"""`inference.GRPCInferenceService`, KServe's protocol, on gRPC: a thin adapter around the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from importlib.metadata import version
from typing import Any, TypeAlias, cast

import grpc
import grpc.aio
from tandem.kserve import open_inference_pb2 as pb

from cluster.door import Door
from cluster.gateway import Gateway
from cluster.guarded_calls import guarded, to_bytes, unary
from cluster.kserve.infer_answer import IS_FINAL, InferAnswer
from cluster.kserve.infer_request import VERSION, InferRequest
from cluster.kserve.interleaved import interleaved
from cluster.kserve.metadata import model_metadata
from cluster.messages import Chunk, Complete
from cluster.openai.request import told
from cluster.security.caller import Caller
from cluster.security.clients import Clients
from engine.errors import DeadlineExceeded, InvalidArgument, NotFound, TandemError
from engine.trace_context import trace_of
from kvtransfer.rpc_server import RpcService

DESCRIPTOR = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
SERVER_NAME = "tandem"
# Of one stream, at once.
MAX_STREAM_REQUESTS = 64
# A stream with nothing under way is ended after this.
STREAM_IDLE_S = 300.0
# Triton's: errors of a stream's requests are to end it, with their status.
ERRORS_END_STREAM = ("triton_grpc_error", "true")
MAX_ERROR_CHARS = 1024

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


def kserve_service(
    gateway: Gateway, clients: Clients | None, is_ready: Callable[[], bool], *, stream_idle_s: float = STREAM_IDLE_S
) -> RpcService:
    """KServe's service in front of `gateway`, to be handed to `start_server`. `clients` says who calls; None: everybody
    may. `is_ready`: whether a request that comes now has workers to go to."""

    def served(caller: Caller) -> _Inference:
        return _Inference(gateway, is_ready, caller, stream_idle_s)

    async def server_live(request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def server_ready(request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=is_ready() and not gateway.is_draining)

    behind_the_door = guarded(
        Door(gateway, clients),
        {
            "ModelReady": lambda caller: unary(served(caller).model_ready, pb.ModelReadyRequest),
            "ServerMetadata": lambda caller: unary(served(caller).server_metadata, pb.ServerMetadataRequest),
            "ModelMetadata": lambda caller: unary(served(caller).model_metadata, pb.ModelMetadataRequest),
            "ModelInfer": lambda caller: unary(served(caller).model_infer, pb.ModelInferRequest),
            "ModelStreamInfer": lambda caller: grpc.stream_stream_rpc_method_handler(
                served(caller).model_stream_infer,
                request_deserializer=pb.ModelInferRequest.FromString,
                response_serializer=to_bytes,
            ),
        },
    )
    # As the health service: load balancers have no keys.
    open_to_all = {
        "ServerLive": unary(server_live, pb.ServerLiveRequest),
        "ServerReady": unary(server_ready, pb.ServerReadyRequest),
    }
    return RpcService(DESCRIPTOR, {**behind_the_door, **open_to_all})


class _Inference:
    """Serves the calls of one caller."""

    def __init__(self, gateway: Gateway, is_ready: Callable[[], bool], caller: Caller, stream_idle_s: float) -> None:
        self._gateway = gateway
        self._is_ready = is_ready
        self._caller = caller
        self._stream_idle_s = stream_idle_s

    async def server_metadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name=SERVER_NAME, version=version("tandem-serving"))

    async def model_ready(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        ready = self._is_served(request.name, request.version) and self._is_ready() and not self._gateway.is_draining
        return pb.ModelReadyResponse(ready=ready)

    async def model_metadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        model = self._gateway.model
        if not self._is_served(request.name, request.version):
            asked = f"{request.name} version {request.version}" if request.version else request.name
            raise NotFound("model", asked, known=f"{model.name} version {VERSION}")
        return model_metadata(model.name)

    async def model_infer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        asked = InferRequest(request)
        if asked.is_streamed:
            raise InvalidArgument("stream", True, "false, or a call of ModelStreamInfer")
        answer = self._answer(request, asked)
        async with aclosing(self._parts(asked, context)) as parts:
            async for part in parts:
                if isinstance(part, Complete):
                    return answer.whole(part)
        raise AssertionError("the gateway's last part is a Complete")

    async def model_stream_infer(
        self, requests: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """An error of one request is told beside its id, and the others go on; unless the caller wants it to end the
        stream, as a status."""
        errors_end_it = ERRORS_END_STREAM in (context.invocation_metadata() or ())
        has_begun = False

        async def answers(request: pb.ModelInferRequest) -> AsyncGenerator[pb.ModelStreamInferResponse, None]:
            nonlocal has_begun
            is_first, has_begun = not has_begun, True
            try:
                if not is_first:
                    # The call itself was counted for the first.
                    self._gateway.quotas.call(self._caller.tenant, asyncio.get_running_loop().time())
                async with aclosing(self._responses(request, context)) as responses:
                    async for response in responses:
                        yield pb.ModelStreamInferResponse(infer_response=response)
            except TandemError as error:
                if errors_end_it:
                    raise
                yield _told_in_the_stream(request, error)

        stream = interleaved(requests, answers, most=MAX_STREAM_REQUESTS, idle_s=self._stream_idle_s)
        async with aclosing(stream) as responses:
            async for response in responses:
                yield response

    async def _responses(
        self, request: pb.ModelInferRequest, context: Context
    ) -> AsyncGenerator[pb.ModelInferResponse, None]:
        asked = InferRequest(request)
        answer = self._answer(request, asked)
        async with aclosing(self._parts(asked, context)) as parts:
            async for part in parts:
                if isinstance(part, Complete):
                    yield answer.last(part) if asked.is_streamed else answer.whole(part)
                elif asked.is_streamed:
                    yield answer.chunk(part)

    def _answer(self, request: pb.ModelInferRequest, asked: InferRequest) -> InferAnswer:
        return InferAnswer(request, self._gateway.model.name, as_raw=asked.is_raw, before=asked.before)

    async def _parts(self, asked: InferRequest, context: Context) -> AsyncGenerator[Chunk | Complete, None]:
        """The call's deadline is the request's, where that has no earlier one."""
        left_s = context.time_remaining()
        if left_s is not None and left_s <= 0:
            raise DeadlineExceeded("arrival at the gateway")
        tenant = self._caller.tenant
        # The gateway's own id: that of the protocol need not be unique.
        request = asked.generate_request(self._gateway.new_request_id(tenant), left_s, tenant)
        request = replace(request, trace=trace_of(context.invocation_metadata() or ()))
        stream = cast(AsyncGenerator[Chunk | Complete, None], self._gateway.generate(request))
        try:
            async with aclosing(stream) as parts:
                async for part in parts:
                    yield part
        except TandemError as error:
            raise told(error, asked.names) from error

    def _is_served(self, name: str, model_version: str) -> bool:
        return name == self._gateway.model.name and model_version in ("", VERSION)


def _told_in_the_stream(request: pb.ModelInferRequest, error: TandemError) -> pb.ModelStreamInferResponse:
    response = pb.ModelInferResponse(model_name=request.model_name, model_version=VERSION, id=request.id)
    response.parameters[IS_FINAL].bool_param = True
    return pb.ModelStreamInferResponse(error_message=str(error)[:MAX_ERROR_CHARS], infer_response=response)
