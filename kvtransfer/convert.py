"""Values to protobuf messages and back: what several services share."""

from __future__ import annotations

import struct
from dataclasses import asdict
from typing import Any

from tandem.v1 import inference_pb2, kv_pb2

from engine.batch import KVLayout, Sampled
from engine.errors import InvalidArgument
from engine.request import Receipt
from engine.sampling import MAX_LOGIT_BIAS, MAX_STOPS, SamplingParams
from engine.structure import Structure

_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_COUNTS = ("top_k", "seed", "n", "max_tokens", "min_tokens", "logprobs")
_FLAGS = ("ignore_eos", "include_stop_str_in_output")
_FLOAT32 = struct.Struct("<f")
_INT32_MAX = (1 << 31) - 1


def params_to_proto(params: SamplingParams) -> inference_pb2.SamplingParams:
    """`params` must be valid (SamplingParams.validate): numbers outside the field's type raise ValueError."""
    fields: dict[str, Any] = {name: getattr(params, name) for name in (*_FLOATS, *_COUNTS, *_FLAGS)}
    # No vocabulary is larger than the largest int32: there the limit says the same.
    fields["top_k"] = min(params.top_k, _INT32_MAX)
    structure = params.structure
    return inference_pb2.SamplingParams(
        **fields,
        logit_bias=dict(params.logit_bias),
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        skip_special_tokens=params.skip_special_tokens,
        structure=None if structure is None else inference_pb2.Structure(kind=structure.kind, text=structure.text),
    )


def params_from_proto(message: inference_pb2.SamplingParams) -> SamplingParams:
    """Fields that are not set keep their defaults. The values are not checked: see SamplingParams.validate. Raises
    InvalidArgument for lists so long that copying them would take its time.

    `logit_bias` comes out in order of token id.
    """
    for name, longest in (("logit_bias", MAX_LOGIT_BIAS), ("stop", MAX_STOPS), ("stop_token_ids", MAX_STOPS)):
        if (count := len(getattr(message, name))) > longest:
            raise InvalidArgument(f"sampling_params.{name}", f"{count} entries", f"at most {longest}")
    given: dict[str, Any] = {name: shortest(getattr(message, name)) for name in _FLOATS if message.HasField(name)}
    given |= {name: getattr(message, name) for name in (*_COUNTS, "skip_special_tokens") if message.HasField(name)}
    given |= {name: getattr(message, name) for name in _FLAGS}
    return SamplingParams(
        **given,
        logit_bias=tuple((token_id, shortest(bias)) for token_id, bias in sorted(message.logit_bias.items())),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        structure=Structure(message.structure.kind, message.structure.text) if message.HasField("structure") else None,
    )


def layout_to_proto(layout: KVLayout) -> kv_pb2.KVLayout:
    return kv_pb2.KVLayout(**asdict(layout))


def layout_from_proto(message: kv_pb2.KVLayout) -> KVLayout:
    return KVLayout(
        model=message.model,
        num_layers=message.num_layers,
        num_kv_heads=message.num_kv_heads,
        head_dim=message.head_dim,
        dtype=message.dtype,
        block_size=message.block_size,
        num_blocks=message.num_blocks,
    )


def sampled_to_proto(token: Sampled) -> inference_pb2.TokenLogprob:
    return inference_pb2.TokenLogprob(
        token_id=token.token_id,
        logprob=token.logprob,
        top=[inference_pb2.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in token.top],
    )


def sampled_from_proto(message: inference_pb2.TokenLogprob) -> Sampled:
    """Log-probabilities come back rounded to float32."""
    top = tuple((other.token_id, other.logprob) for other in message.top)
    return Sampled(message.token_id, message.logprob, top)


def receipt_to_proto(receipt: Receipt) -> inference_pb2.Receipt:
    return inference_pb2.Receipt(**asdict(receipt))


def receipt_from_proto(message: inference_pb2.Receipt) -> Receipt:
    return Receipt(**{name: getattr(message, name) for name in Receipt.__dataclass_fields__})


def shortest(value: float) -> float:
    """The shortest decimal that rounds to this float32: 0.7 stays 0.7 on its way through a `float` field.

    So a draw does not depend on how many times its parameters have crossed a wire.
    """
    if value != value or value in (float("inf"), float("-inf")):
        return value
    bits = _FLOAT32.pack(value)
    for digits in range(6, 9):
        short = float(f"{value:.{digits}g}")
        # The largest float32 values have short forms just beyond the type's range.
        if abs(short) <= 3.4028234e38 and _FLOAT32.pack(short) == bits:
            return short
    return value
