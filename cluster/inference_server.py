"""`tandem.v1.Inference` on gRPC: a thin adapter around the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, TypeAlias, cast

import grpc
import grpc.aio
from google.protobuf.message import Message as ProtoMessage
from tandem.v1 import inference_pb2

from cluster.gateway import Gateway
from cluster.inference_convert import (
    chunk_to_proto,
    complete_to_proto,
    messages_from_proto,
    model_to_proto,
    request_from_proto,
    status_to_proto,
)
from cluster.messages import Chunk, Complete
from engine.errors import DeadlineExceeded, InvalidArgument
from engine.tokenizer import Tokenizer
from kvtransfer.rpc_server import RpcService

DESCRIPTOR = inference_pb2.DESCRIPTOR.services_by_name["Inference"]
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


def inference_service(gateway: Gateway, *, max_prompt_chars: int = 1_000_000) -> RpcService:
    """`tandem.v1.Inference` in front of `gateway`, to be handed to `start_server`.

    `max_prompt_chars` bounds what Tokenize takes, as the gateway's own limit bounds what Generate takes.
    """
    servicer = _Inference(gateway, max_prompt_chars)
    generate = grpc.unary_stream_rpc_method_handler(
        servicer.generate,
        request_deserializer=inference_pb2.GenerateRequest.FromString,
        response_serializer=inference_pb2.GenerateResponse.SerializeToString,
    )
    return RpcService(
        DESCRIPTOR,
        {
            "Generate": generate,
            "GetModel": _unary(servicer.get_model, inference_pb2.GetModelRequest),
            "Tokenize": _unary(servicer.tokenize, inference_pb2.TokenizeRequest),
            "Detokenize": _unary(servicer.detokenize, inference_pb2.DetokenizeRequest),
            "GetStatus": _unary(servicer.get_status, inference_pb2.GetStatusRequest),
        },
    )


class _Inference:
    def __init__(self, gateway: Gateway, max_prompt_chars: int) -> None:
        self._gateway = gateway
        self._max_prompt_chars = max_prompt_chars

    async def generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """The client's deadline is the request's. Its cancel, or its death, closes the gateway's generator."""
        left_s = context.time_remaining()
        if left_s is not None and left_s <= 0:
            raise DeadlineExceeded("arrival at the gateway")
        request_id = request.request_id or self._gateway.new_request_id()
        asked = request_from_proto(request, request_id, left_s)
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
        tokenizer = self._tokenizer()
        match request.WhichOneof("input"):
            case "text":
                self._check_chars("text", len(request.text))
                token_ids = tokenizer.encode(request.text)
            case "messages":
                messages = messages_from_proto(request.messages)
                self._check_chars("messages", sum(len(turn.role) + len(turn.content) for turn in messages))
                token_ids = tokenizer.encode_chat([{"role": turn.role, "content": turn.content} for turn in messages])
            case _:
                raise InvalidArgument("input", None, "text or messages")
        return inference_pb2.TokenizeResponse(token_ids=token_ids)

    async def detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        skip_special_tokens = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        self._check_chars("token_ids", len(request.token_ids))
        text = self._tokenizer().decode(list(request.token_ids), skip_special_tokens)
        return inference_pb2.DetokenizeResponse(text=text)

    async def get_status(
        self, request: inference_pb2.GetStatusRequest, context: Context
    ) -> inference_pb2.GetStatusResponse:
        return status_to_proto(self._gateway.status(asyncio.get_running_loop().time()))

    def _tokenizer(self) -> Tokenizer:
        if self._gateway.tokenizer is None:
            raise InvalidArgument("model", self._gateway.model.name, "a model with a tokenizer; this gateway has none")
        return self._gateway.tokenizer

    def _check_chars(self, field: str, count: int) -> None:
        if count > self._max_prompt_chars:
            raise InvalidArgument(field, f"a length of {count}", f"at most {self._max_prompt_chars}")


def _unary(behaviour: Any, request: type[ProtoMessage]) -> grpc.RpcMethodHandler[Any, Any]:  # noqa: ANN401
    return grpc.unary_unary_rpc_method_handler(
        behaviour, request_deserializer=request.FromString, response_serializer=_to_bytes
    )


def _to_bytes(message: ProtoMessage) -> bytes:
    return message.SerializeToString()
