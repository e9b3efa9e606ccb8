"""`ModelInferResponse`: what the gateway gives, as tensors.

In every response, `text_output`, `sequence_index`, `finish_reason` and `num_output_tokens` have one element for each
choice that it says something of, and `output_ids` the tokens of all of them, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tandem.kserve import open_inference_pb2 as pb

from cluster.kserve.infer_request import VERSION
from cluster.kserve.tensors import BYTES, Tensor, add_output
from cluster.messages import Choice, Chunk, Complete, Usage
from engine.batch import Sampled
from engine.errors import InvalidArgument

# Name and datatype; those of `OF_THE_END` come with a request's last response only.
OUTPUTS = {
    "text_output": BYTES,
    "output_ids": "INT64",
    "sequence_index": "INT32",
    "finish_reason": BYTES,
    "num_output_tokens": "UINT32",
    "num_input_tokens": "UINT32",
    "cached_tokens": "UINT32",
}
OF_THE_END = ("num_input_tokens", "cached_tokens")
# Triton's: whether there are no more responses to a request.
IS_FINAL = "triton_final_response"


class InferAnswer:
    """Of one request. `before` stands before the text of each choice. Raises InvalidArgument for outputs that there are
    not."""

    def __init__(self, message: pb.ModelInferRequest, model_name: str, *, as_raw: bool, before: str = "") -> None:
        self._id = message.id
        self._model_name = model_name
        self._as_raw = as_raw
        self._before = before
        self._wanted = _wanted(message.outputs) or tuple(OUTPUTS)

    def whole(self, complete: Complete) -> pb.ModelInferResponse:
        tensors = [*self._choices(complete.choices), *_counts(complete.usage)]
        return self._response(tensors, is_final=True)

    def chunk(self, chunk: Chunk) -> pb.ModelInferResponse:
        return self._response(_parts([chunk.text], [chunk.tokens], [chunk.index], [""]), is_final=False)

    def last(self, complete: Complete) -> pb.ModelInferResponse:
        """After chunks: how each choice ended, and the counts."""
        choices = complete.choices
        nothing: Sequence[tuple[Sampled, ...]] = [()] * len(choices)
        indices, reasons = [choice.index for choice in choices], [choice.finish_reason for choice in choices]
        ends = _parts([""] * len(choices), nothing, indices, reasons)
        return self._response([*ends, *_counts(complete.usage)], is_final=True)

    def _choices(self, choices: Sequence[Choice]) -> Iterator[Tensor]:
        return _parts(
            [self._before + choice.text for choice in choices],
            [choice.tokens for choice in choices],
            [choice.index for choice in choices],
            [choice.finish_reason for choice in choices],
        )

    def _response(self, tensors: Iterable[Tensor], *, is_final: bool) -> pb.ModelInferResponse:
        response = pb.ModelInferResponse(model_name=self._model_name, model_version=VERSION, id=self._id)
        response.parameters[IS_FINAL].bool_param = is_final
        found = {tensor.name: tensor for tensor in tensors}
        for name in self._wanted:
            if name in found:
                add_output(response, found[name], as_raw=self._as_raw)
        return response


def _parts(
    texts: Sequence[str], tokens: Sequence[Sequence[Sampled]], indices: Sequence[int], reasons: Sequence[str]
) -> Iterator[Tensor]:
    ids = [token.token_id for each in tokens for token in each]
    values = (texts, ids, indices, reasons, [len(each) for each in tokens])
    for (name, datatype), elements in zip(OUTPUTS.items(), values, strict=False):
        yield Tensor(name, datatype, elements)


def _counts(usage: Usage) -> Iterator[Tensor]:
    for name, count in zip(OF_THE_END, (usage.prompt_tokens, usage.cached_tokens), strict=True):
        yield Tensor(name, OUTPUTS[name], [count])


def _wanted(outputs: Sequence[pb.ModelInferRequest.InferRequestedOutputTensor]) -> tuple[str, ...]:
    """Each once, in the order that they were named in."""
    if len(outputs) > len(OUTPUTS):
        raise InvalidArgument("outputs", f"{len(outputs)} names", f"at most {len(OUTPUTS)}")
    for output in outputs:
        if output.name not in OUTPUTS:
            raise InvalidArgument("outputs", output.name, f"some of {', '.join(OUTPUTS)}")
        if output.parameters:
            raise InvalidArgument(f"{output.name}.parameters", next(iter(output.parameters)), "none")
    return tuple(dict.fromkeys(output.name for output in outputs))
