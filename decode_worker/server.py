"""A decode worker on gRPC: a thin adapter around any DecodeService."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import cast

import grpc
import grpc.aio
from tandem.v1 import worker_pb2

from decode_worker.convert import frame_to_bytes, received_from_bytes
from decode_worker.stream import DecodeService, Received, TokenFrame
from kvtransfer.rpc_server import RpcService

DESCRIPTOR = worker_pb2.DESCRIPTOR.services_by_name["DecodeWorker"]


def decode_service(service: DecodeService) -> RpcService:
    """`tandem.v1.DecodeWorker` in front of `service`, to be handed to `start_server`.

    When the gateway disconnects, or dies, the service's generator is closed at once, and its cleanup is waited for.
    """

    async def attach(
        commands: AsyncIterator[Received], context: grpc.aio.ServicerContext[Received, TokenFrame]
    ) -> AsyncIterator[TokenFrame]:
        stream = cast(AsyncGenerator[TokenFrame, None], service.attach(commands))
        async with aclosing(stream) as frames:
            async for frame in frames:
                yield frame

    handler = grpc.stream_stream_rpc_method_handler(
        attach, request_deserializer=received_from_bytes, response_serializer=frame_to_bytes
    )
    return RpcService(DESCRIPTOR, {"Attach": handler}, is_internal=True)
