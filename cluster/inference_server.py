"""`tandem.v1.Inference` on gRPC: a thin adapter around the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeAlias, cast

import grpc
import grpc.aio
from tandem.v1 import inference_pb2

from cluster.door import Door
from cluster.gateway import Gateway
from cluster.guarded_calls import guarded, unary
from cluster.inference_convert import (
    chunk_to_proto,
    complete_to_proto,
    messages_from_proto,
    model_to_proto,
    request_from_proto,
    status_to_proto,
)
from cluster.messages import Chunk, Complete
from cluster.security.caller import Caller
from cluster.security.clients import Clients
from cluster.tokenize_calls import TokenizeCalls
from engine.errors import DeadlineExceeded, InvalidArgument, PermissionDenied
from engine.trace_context import trace_of
from kvtransfer.rpc_server import RpcService

DESCRIPTOR = inference_pb2.DESCRIPTOR.services_by_name["Inference"]
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


def inference_service(
    gateway: Gateway, clients: Clients | None = None, *, max_prompt_chars: int = 1_000_000
) -> RpcService:
    """`tandem.v1.Inference` in front of `gateway`, to be handed to `start_server`.

    `clients` says who calls; None: everybody may, and nobody is told apart. `max_prompt_chars` bounds what Tokenize
    takes, as the gateway's own limit bounds what Generate takes.
    """

    def served(caller: Caller) -> _Inference:
        return _Inference(gateway, max_prompt_chars, caller)

    handlers = guarded(
        Door(gateway, clients),
        {
            "Generate": lambda caller: grpc.unary_stream_rpc_method_handler(
                served(caller).generate,
                request_deserializer=inference_pb2.GenerateRequest.FromString,
                response_serializer=inference_pb2.GenerateResponse.SerializeToString,
            ),
            "GetModel": lambda caller: unary(served(caller).get_model, inference_pb2.GetModelRequest),
            "Tokenize": lambda caller: unary(served(caller).tokenize, inference_pb2.TokenizeRequest),
            "Detokenize": lambda caller: unary(served(caller).detokenize, inference_pb2.DetokenizeRequest),
            "GetStatus": lambda caller: unary(served(caller).get_status, inference_pb2.GetStatusRequest),
        },
    )
    return RpcService(DESCRIPTOR, handlers)


class _Inference:
    """Serves the calls of one caller."""

    def __init__(self, gateway: Gateway, max_prompt_chars: int, caller: Caller) -> None:
        self._gateway = gateway
        self._tokenize_calls = TokenizeCalls(gateway, max_prompt_chars)
        self._caller = caller

    async def generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """The client's deadline is the request's. Its cancel, or its death, closes the gateway's generator."""
        left_s = context.time_remaining()
        if left_s is not None and left_s <= 0:
            raise DeadlineExceeded("arrival at the gateway")
        tenant = self._caller.tenant
        request_id = request.request_id or self._gateway.new_request_id(tenant)
        asked = request_from_proto(request, request_id, left_s, tenant)
        asked = replace(asked, trace=trace_of(context.invocation_metadata() or ()))
        with_logprobs = asked.params.logprobs is not None
        stream = cast(AsyncGenerator[Chunk | Complete, None], self._gateway.generate(asked))
        async with aclosing(stream) as parts:
            async for part in parts:
                if isinstance(part, Chunk):
                    chunk = chunk_to_proto(part, with_logprobs)
                    yield inference_pb2.GenerateResponse(request_id=request_id, chunk=chunk)
                else:
                    complete = complete_to_proto(part, with_logprobs)
                    yield inference_pb2.GenerateResponse(request_id=request_id, complete=complete)

    async def get_model(
        self, request: inference_pb2.GetModelRequest, context: Context
    ) -> inference_pb2.GetModelResponse:
        return model_to_proto(self._gateway.model)

    async def tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        match request.WhichOneof("input"):
            case "text":
                token_ids = await self._tokenize_calls.encode(request.text)
            case "messages":
                token_ids = await self._tokenize_calls.encode_chat(messages_from_proto(request.messages))
            case _:
                raise InvalidArgument("input", None, "text or messages")
        return inference_pb2.TokenizeResponse(token_ids=token_ids)

    async def detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        skip_special_tokens = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        text = await self._tokenize_calls.decode(request.token_ids, skip_special_tokens)
        return inference_pb2.DetokenizeResponse(text=text)

    async def get_status(
        self, request: inference_pb2.GetStatusRequest, context: Context
    ) -> inference_pb2.GetStatusResponse:
        if not self._caller.is_operator:
            raise PermissionDenied("the cluster's status is for operators (gateway.auth.operators)")
        return status_to_proto(self._gateway.status(asyncio.get_running_loop().time()))
