"""A prefill worker on gRPC: a thin adapter around any PrefillService."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import cast

import grpc
import grpc.aio
from tandem.v1 import prefill_pb2

from engine.trace_context import TraceContext, trace_of
from kvtransfer.convert import layout_from_proto, params_from_proto
from kvtransfer.frames import Frame, KVRange
from kvtransfer.grpc_transport import frame_to_message
from kvtransfer.rpc_server import RpcService
from kvtransfer.transport import PrefillCall, PrefillService

DESCRIPTOR = prefill_pb2.DESCRIPTOR.services_by_name["PrefillWorker"]


def prefill_service(
    service: PrefillService,
    check: Callable[[PrefillCall, bytes], None] | None = None,
    encode: Callable[[Frame, int], bytes] = frame_to_message,
) -> RpcService:
    """`tandem.v1.PrefillWorker` in front of `service`, to be handed to `start_server`. `check` gets every call, with
    its caller's proof, before the service does, and raises for one that is not allowed. `encode` makes the message of a
    frame of a lease.

    The service's generator is asked for a frame only when gRPC has taken the last one. When the call ends, by the
    client's cancel, its death or its deadline, the generator is closed at once, and its cleanup is waited for.
    """

    async def prefill(
        request: prefill_pb2.PrefillRequest,
        context: grpc.aio.ServicerContext[prefill_pb2.PrefillRequest, bytes],
    ) -> AsyncIterator[bytes]:
        call = call_from_proto(request, context.time_remaining(), trace_of(context.invocation_metadata() or ()))
        if check is not None:
            check(call, request.proof)
        stream = cast(AsyncGenerator[Frame, None], service.prefill(call))
        async with aclosing(stream) as frames:
            async for frame in frames:
                yield encode(frame, call.lease)

    handler: grpc.RpcMethodHandler[prefill_pb2.PrefillRequest, bytes] = grpc.unary_stream_rpc_method_handler(
        prefill,
        request_deserializer=prefill_pb2.PrefillRequest.FromString,
        # They are bytes already: only the handler knows the lease.
        response_serializer=None,
    )
    return RpcService(DESCRIPTOR, {"Prefill": handler}, is_internal=True)


def call_from_proto(
    request: prefill_pb2.PrefillRequest, deadline_s: float | None, trace: TraceContext | None = None
) -> PrefillCall:
    """`deadline_s`: what is left of the call's own deadline, None for no deadline. `trace`: its caller's span."""
    return PrefillCall(
        request_id=request.request_id,
        token_ids=tuple(request.token_ids),
        params=params_from_proto(request.sampling_params),
        seed=request.seed,
        have_tokens=request.have_tokens,
        layout=layout_from_proto(request.layout),
        deadline_s=deadline_s,
        salt=request.salt,
        ttft_due_s=request.ttft_due_s if request.HasField("ttft_due_s") else None,
        prompt_tokens=request.prompt_tokens,
        lease=request.lease,
        wanted=tuple(
            KVRange(part.first_token, part.end_token, part.first_layer, part.end_layer) for part in request.wanted
        ),
        ticket=request.ticket,
        trace=trace,
    )
