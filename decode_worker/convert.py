"""The token stream's values to protobuf messages and back."""

from __future__ import annotations

from google.protobuf.message import DecodeError
from tandem.v1 import worker_pb2

from decode_worker.stream import (
    Cancel,
    ChoiceSoFar,
    Command,
    Delta,
    Done,
    Event,
    Failed,
    Received,
    Submit,
    TokenFrame,
    Unreadable,
)
from engine.errors import CorruptFrame, InvalidArgument, TandemError
from engine.request import FinishReason
from engine.trace_context import read_trace
from kvtransfer.convert import (
    params_from_proto,
    params_to_proto,
    receipt_from_proto,
    receipt_to_proto,
    sampled_from_proto,
    sampled_to_proto,
)
from kvtransfer.rpc import error_from_parts, error_to_bytes, status_of


def command_to_bytes(command: Command) -> bytes:
    """The bytes of a `tandem.v1.Command`."""
    match command:
        case Submit():
            submit = worker_pb2.Submit(
                request_id=command.request_id,
                token_ids=command.token_ids,
                sampling_params=params_to_proto(command.params),
                seed=command.seed,
                prefill_address=command.prefill_address,
                deadline_s=command.deadline_s,
                salt=command.salt,
                ttft_due_s=command.ttft_due_s,
                tpot_s=command.tpot_s,
                prompt_tokens=command.prompt_tokens,
                resumed=[
                    worker_pb2.ChoiceSoFar(token_ids=choice.token_ids, is_finished=choice.is_finished)
                    for choice in command.resumed
                ],
                ticket=command.ticket,
                traceparent="" if command.trace is None else command.trace.traceparent,
                tracestate="" if command.trace is None else command.trace.state,
            )
            return worker_pb2.Command(submit=submit).SerializeToString()
        case Cancel():
            return worker_pb2.Command(cancel=worker_pb2.Cancel(request_id=command.request_id)).SerializeToString()


def command_from_bytes(raw: bytes) -> Command:
    """Raises InvalidArgument for a command of an unknown kind, DecodeError for bytes that are no command at all."""
    message = worker_pb2.Command.FromString(raw)
    kind = message.WhichOneof("command")
    if kind == "cancel":
        return Cancel(message.cancel.request_id)
    if kind is None:
        raise InvalidArgument("command", "", "submit or cancel")
    submit = message.submit
    return Submit(
        request_id=submit.request_id,
        token_ids=tuple(submit.token_ids),
        params=params_from_proto(submit.sampling_params),
        seed=submit.seed,
        prefill_address=submit.prefill_address,
        deadline_s=submit.deadline_s if submit.HasField("deadline_s") else None,
        salt=submit.salt,
        ttft_due_s=submit.ttft_due_s if submit.HasField("ttft_due_s") else None,
        tpot_s=submit.tpot_s if submit.HasField("tpot_s") else None,
        prompt_tokens=submit.prompt_tokens,
        resumed=tuple(ChoiceSoFar(tuple(choice.token_ids), choice.is_finished) for choice in submit.resumed),
        ticket=submit.ticket,
        trace=read_trace(submit.traceparent, submit.tracestate),
    )


def received_from_bytes(raw: bytes) -> Received:
    """As command_from_bytes, but a field that cannot be read is the matter of its request alone: to raise ends the
    stream, and with it all others of its gateway."""
    try:
        return command_from_bytes(raw)
    except InvalidArgument as error:
        message = worker_pb2.Command.FromString(raw)
        if message.WhichOneof("command") is None:
            raise
        return Unreadable(message.submit.request_id, error)


def frame_to_bytes(frame: TokenFrame) -> bytes:
    """The bytes of a `tandem.v1.TokenFrame`."""
    events = [_event_to_proto(event) for event in frame.events]
    return worker_pb2.TokenFrame(step=frame.step, events=events).SerializeToString()


def frame_from_bytes(raw: bytes) -> TokenFrame:
    """Raises CorruptFrame."""
    try:
        message = worker_pb2.TokenFrame.FromString(raw)
        return TokenFrame(message.step, tuple(_event_from_proto(event) for event in message.events))
    except (DecodeError, ValueError) as error:
        raise CorruptFrame(f"token frame of {len(raw)} bytes cannot be read: {error}") from error


def _event_to_proto(event: Event) -> worker_pb2.Event:
    match event:
        case Delta():
            delta = worker_pb2.Delta(
                choice=event.choice,
                tokens=[sampled_to_proto(token) for token in event.tokens],
                finish_reason=event.finish_reason or "",
                matched_token_id=event.matched_token_id,
            )
            return worker_pb2.Event(request_id=event.request_id, delta=delta)
        case Done():
            done = worker_pb2.Done(cached_tokens=event.cached_tokens, receipt=receipt_to_proto(event.receipt))
            return worker_pb2.Event(request_id=event.request_id, done=done)
        case Failed():
            # A bug's own words stay on the worker, where its traceback is.
            error = event.error if isinstance(event.error, TandemError) else TandemError("internal error")
            code: int = status_of(error).value[0]
            failed = worker_pb2.Failed(status_code=code, message=str(error), details=error_to_bytes(error))
            return worker_pb2.Event(request_id=event.request_id, failed=failed)


def _event_from_proto(message: worker_pb2.Event) -> Event:
    match message.WhichOneof("event"):
        case "delta":
            delta = message.delta
            return Delta(
                request_id=message.request_id,
                choice=delta.choice,
                tokens=tuple(sampled_from_proto(token) for token in delta.tokens),
                finish_reason=FinishReason(delta.finish_reason) if delta.finish_reason else None,
                matched_token_id=delta.matched_token_id if delta.HasField("matched_token_id") else None,
            )
        case "done":
            receipt = receipt_from_proto(message.done.receipt)
            return Done(message.request_id, message.done.cached_tokens, receipt)
        case "failed":
            failed = message.failed
            return Failed(message.request_id, error_from_parts(failed.status_code, failed.message, failed.details))
        case _:
            raise ValueError("an event is a delta, done or failed")
