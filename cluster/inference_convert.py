"""The gateway's values to `tandem.v1.Inference` messages and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from tandem.v1 import inference_pb2

from cluster.messages import Chunk, ClusterStatus, Complete, GenerateRequest, Message, ModelInfo, WorkerStatus
from engine.batch import Sampled
from engine.errors import InvalidArgument
from engine.objectives import Objectives
from kvtransfer.convert import params_from_proto, receipt_to_proto, sampled_to_proto

# Turns of one conversation. As many as a request holds bytes would take the gateway a second to look at.
MAX_MESSAGES = 4096
# Messages have them all, by the same names.
WORKER_FIELDS = tuple(WorkerStatus.__dataclass_fields__)
STATUS_FIELDS = tuple(ClusterStatus.__dataclass_fields__)


def request_from_proto(
    message: inference_pb2.GenerateRequest, request_id: str, deadline_s: float | None, tenant: str = ""
) -> GenerateRequest:
    """Raises InvalidArgument where there is no prompt at all; the gateway checks the values."""
    return GenerateRequest(
        request_id=request_id,
        prompt=_prompt_from_proto(message),
        params=params_from_proto(message.sampling_params),
        model=message.model,
        salt=message.cache_salt.encode(),
        deadline_s=deadline_s,
        objectives=_objectives_from_proto(message.objectives),
        slo_class=message.slo_class,
        on_failure=message.on_failure,
        tenant=tenant,
    )


def messages_from_proto(turns: inference_pb2.Messages) -> tuple[Message, ...]:
    """Raises InvalidArgument for a conversation without a turn, or with too many."""
    if not 0 < len(turns.messages) <= MAX_MESSAGES:
        raise InvalidArgument("messages", f"{len(turns.messages)} messages", f"at least one, at most {MAX_MESSAGES}")
    return tuple(Message(turn.role, turn.content) for turn in turns.messages)


def chunk_to_proto(chunk: Chunk, with_logprobs: bool) -> inference_pb2.GenerateChunk:
    return inference_pb2.GenerateChunk(
        index=chunk.index,
        text=chunk.text,
        token_ids=_ids(chunk.tokens),
        logprobs=_logprobs(chunk.tokens, with_logprobs),
    )


def complete_to_proto(complete: Complete, with_logprobs: bool) -> inference_pb2.GenerateComplete:
    choices = [
        inference_pb2.Choice(
            index=choice.index,
            text=choice.text,
            token_ids=_ids(choice.tokens),
            finish_reason=choice.finish_reason,
            matched_stop_str=choice.matched_stop_str,
            matched_token_id=choice.matched_token_id,
            logprobs=_logprobs(choice.tokens, with_logprobs),
        )
        for choice in complete.choices
    ]
    usage = inference_pb2.Usage(**asdict(complete.usage))
    return inference_pb2.GenerateComplete(choices=choices, usage=usage, receipt=receipt_to_proto(complete.receipt))


def model_to_proto(model: ModelInfo) -> inference_pb2.GetModelResponse:
    return inference_pb2.GetModelResponse(
        model=model.name,
        architecture=model.architecture,
        vocab_size=model.vocab_size,
        max_context=model.max_context,
        eos_token_ids=model.eos_token_ids,
        dtype=model.dtype,
        has_chat_template=model.has_chat_template,
    )


def status_to_proto(status: ClusterStatus) -> inference_pb2.GetStatusResponse:
    workers = [
        inference_pb2.WorkerStatus(**{name: getattr(worker, name) for name in WORKER_FIELDS})
        for worker in status.workers
    ]
    return inference_pb2.GetStatusResponse(
        workers=workers, **{name: getattr(status, name) for name in STATUS_FIELDS if name != "workers"}
    )


def _objectives_from_proto(message: inference_pb2.Objectives) -> Objectives:
    return Objectives(
        ttft_s=message.ttft_ms / 1e3 if message.HasField("ttft_ms") else None,
        tpot_s=message.tpot_ms / 1e3 if message.HasField("tpot_ms") else None,
    )


def _prompt_from_proto(message: inference_pb2.GenerateRequest) -> str | tuple[int, ...] | tuple[Message, ...]:
    match message.WhichOneof("input"):
        case "text":
            return message.text
        case "token_ids":
            return tuple(message.token_ids.ids)
        case "messages":
            return messages_from_proto(message.messages)
        case _:
            raise InvalidArgument("input", None, "one of text, token_ids and messages")


def _ids(tokens: Sequence[Sampled]) -> list[int]:
    return [token.token_id for token in tokens]


def _logprobs(tokens: Sequence[Sampled], wanted: bool) -> list[inference_pb2.TokenLogprob]:
    return [sampled_to_proto(token) for token in tokens] if wanted else []
