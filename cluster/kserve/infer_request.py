"""`ModelInferRequest`: what it asks of the gateway.

The prompt is the input `text_input` or `input_ids`. How to sample has vLLM's names, and each of them may come as a
parameter of the request, as an input tensor, or in the JSON object `sampling_parameters`, as clients of Triton's
backends send them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Annotated, Any, get_args

from pydantic import Field
from pydantic_core import from_json
from tandem.kserve import open_inference_pb2 as pb

from cluster.intake import MAX_REQUEST_ID_CHARS
from cluster.kserve.tensors import BYTES, MAX_NAME_CHARS, Tensor, read_inputs
from cluster.messages import GenerateRequest
from cluster.openai.request import Prompt, SamplingFields, checked
from engine.errors import InvalidArgument, NotFound
from engine.objectives import Objectives
from engine.sampling import SamplingParams

TEXT, IDS, OPTIONS = "text_input", "input_ids", "sampling_parameters"
VERSION = "1"
# TensorRT-LLM's names where they are not vLLM's.
ALIASES = MappingProxyType({"random_seed": "seed", "stop_words": "stop", "min_length": "min_tokens"})
# Of the gateway's fields, what they are here.
NAMES = {
    "text": TEXT,
    "token_ids": IDS,
    "deadline_s": "timeout",
    "objectives.ttft_ms": "ttft_ms",
    "objectives.tpot_ms": "tpot_ms",
}
# What Triton's clients ask for, and have here anyway.
GIVEN_ANYWAY = frozenset({"triton_enable_empty_final_response"})
MAX_PARAMETERS = 64
LISTS = frozenset({"stop", "stop_token_ids", "guided_choice"})


class InferFields(SamplingFields):
    """All that may stand beside the prompt. `timeout` is in microseconds, as Triton has it."""

    timeout: Annotated[int, Field(gt=0, lt=1 << 63)] | None = None
    exclude_input_in_output: bool | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None

    # As in Triton's vLLM backend, which leaves these outputs out by default.
    return_finish_reason: bool | None = None
    return_num_input_tokens: bool | None = None
    return_num_output_tokens: bool | None = None


class InferRequest:
    """One request, read. Raises InvalidArgument or NotFound for what the gateway need not be asked."""

    def __init__(self, message: pb.ModelInferRequest) -> None:
        if message.model_version not in ("", VERSION):
            raise NotFound("model", f"{message.model_name} version {message.model_version}", known=f"version {VERSION}")
        if len(message.id) > MAX_REQUEST_ID_CHARS:
            raise InvalidArgument("id", message.id, f"at most {MAX_REQUEST_ID_CHARS} characters")
        inputs = read_inputs(message)
        self.id = message.id
        self.is_raw = bool(message.raw_input_contents)
        self.prompt = _prompt(inputs)
        self.fields = checked(InferFields, _values(message, inputs))
        if not self._excludes_prompt and (self.is_streamed or not isinstance(self.prompt, str)):
            raise InvalidArgument("exclude_input_in_output", False, f"true for a stream, and for {IDS}")

    @property
    def is_streamed(self) -> bool:
        return bool(self.fields.stream)

    @property
    def before(self) -> str:
        """What stands before each answer: the prompt, where it is asked for."""
        return self.prompt if isinstance(self.prompt, str) and not self._excludes_prompt else ""

    @property
    def names(self) -> Mapping[str, str]:
        return {**NAMES, "structure": self.fields.structure_field()}

    def generate_request(self, request_id: str, left_s: float | None, tenant: str) -> GenerateRequest:
        """`left_s` of the call's time; None: it has no end."""
        fields = self.fields
        if fields.timeout is not None:
            left_s = min(fields.timeout / 1e6, left_s if left_s is not None else fields.timeout / 1e6)
        longest = SamplingParams().max_tokens if fields.max_tokens is None else fields.max_tokens
        objectives = Objectives(_seconds(fields.ttft_ms), _seconds(fields.tpot_ms))
        request = fields.asks(request_id, self.prompt, fields.sampling(longest, None), objectives, tenant)
        return replace(request, deadline_s=left_s)

    @property
    def _excludes_prompt(self) -> bool:
        return self.fields.exclude_input_in_output is not False


def _prompt(inputs: Mapping[str, Tensor]) -> Prompt:
    text, ids = inputs.get(TEXT), inputs.get(IDS)
    if (text is None) == (ids is None):
        raise InvalidArgument("inputs", sorted(inputs), f"one of {TEXT} and {IDS}")
    if text is not None:
        if text.datatype != BYTES:
            raise InvalidArgument(f"{TEXT}.datatype", text.datatype, BYTES)
        prompt: str = text.only()
        return prompt
    assert ids is not None, "one of the two is there"
    if "INT" not in ids.datatype:
        raise InvalidArgument(f"{IDS}.datatype", ids.datatype, "INT64, or another of whole numbers")
    return tuple(ids.elements)


def _values(message: pb.ModelInferRequest, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    values: dict[str, Any] = {"model": message.model_name}
    for name, value in _given(message, inputs):
        field = ALIASES.get(name, name)
        if field in values:
            raise InvalidArgument(name, value, "a value that is given once")
        values[field] = _read(field, value) if isinstance(value, str) else value
    return values


def _given(message: pb.ModelInferRequest, inputs: Mapping[str, Tensor]) -> Iterator[tuple[str, Any]]:
    """Names and values of parameters, wherever they stand."""
    if len(message.parameters) > MAX_PARAMETERS:
        raise InvalidArgument("parameters", f"{len(message.parameters)} of them", f"at most {MAX_PARAMETERS}")
    # A map comes in any order, and of two that are wrong it should always be the same that is told.
    for name, parameter in sorted(message.parameters.items()):
        if len(name) > MAX_NAME_CHARS:
            raise InvalidArgument("parameters", name, f"names of at most {MAX_NAME_CHARS} characters")
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise InvalidArgument(f"parameters.{name}", None, "a value")
        if name == OPTIONS:
            yield from _options(getattr(parameter, kind))
        elif name not in GIVEN_ANYWAY:
            yield name, getattr(parameter, kind)
    for name, tensor in inputs.items():
        if name == OPTIONS:
            yield from _options(tensor.only())
        elif name not in (TEXT, IDS):
            yield name, list(tensor.elements) if ALIASES.get(name, name) in LISTS else tensor.only()


def _options(text: object) -> Iterator[tuple[str, Any]]:
    try:
        found = from_json(text) if isinstance(text, str) else None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InvalidArgument(OPTIONS, text, "a JSON object")
    yield from found.items()


def _read(field: str, text: str) -> Any:  # noqa: ANN401
    """The value of a field that is no text: not every client can send a number as a parameter."""
    known = InferFields.model_fields.get(field)
    if known is None or known.annotation is str or str in get_args(known.annotation):
        return text
    try:
        return from_json(text)
    except ValueError:
        return text


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3
