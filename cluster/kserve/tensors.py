"""Tensors of the Open Inference Protocol: what a request's hold, and an answer's written.

Their elements come either in the field of `contents` that is for their datatype, or as bytes in the request's
`raw_input_contents`, as Triton's clients send them. An answer's are written as its request's came.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tandem.kserve import open_inference_pb2 as pb

from engine.errors import InvalidArgument
from kvtransfer.convert import shortest

# Of one request; there are some forty names.
MAX_INPUTS = 64
MAX_NAME_CHARS = 128
MAX_DIMENSIONS = 8
# Of one tensor. Prompts are shorter; looking at many more would take its time.
MAX_ELEMENTS = 1 << 20
BYTES = "BYTES"
# Of each datatype the field of `contents`, "" for none, and its element in raw bytes.
DATATYPES = {
    "BOOL": ("bool_contents", "?"),
    "INT8": ("int_contents", "<i1"),
    "INT16": ("int_contents", "<i2"),
    "INT32": ("int_contents", "<i4"),
    "INT64": ("int64_contents", "<i8"),
    "UINT8": ("uint_contents", "<u1"),
    "UINT16": ("uint_contents", "<u2"),
    "UINT32": ("uint_contents", "<u4"),
    "UINT64": ("uint64_contents", "<u8"),
    "FP16": ("", "<f2"),
    "FP32": ("fp32_contents", "<f4"),
    "FP64": ("fp64_contents", "<f8"),
    BYTES: ("bytes_contents", ""),
}
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Tensor:
    """`elements`: row by row; numbers, booleans or, of BYTES, texts."""

    name: str
    datatype: str
    elements: Sequence[Any]

    def only(self) -> Any:  # noqa: ANN401 - whatever the datatype says
        """The element of a tensor with one. Raises InvalidArgument for another."""
        if len(self.elements) != 1:
            raise InvalidArgument(self.name, f"{len(self.elements)} elements", "one: shape [1] or [1, 1]")
        return self.elements[0]


def read_inputs(request: pb.ModelInferRequest) -> dict[str, Tensor]:
    """By name. Raises InvalidArgument naming the input for what is no tensor of its datatype and shape."""
    inputs, raw = request.inputs, request.raw_input_contents
    if len(inputs) > MAX_INPUTS:
        raise InvalidArgument("inputs", f"{len(inputs)} tensors", f"at most {MAX_INPUTS}")
    if raw and len(raw) != len(inputs):
        raise InvalidArgument("raw_input_contents", f"{len(raw)} entries", f"one for each of {len(inputs)} inputs")
    found: dict[str, Tensor] = {}
    for index, each in enumerate(inputs):
        if len(each.name) > MAX_NAME_CHARS:
            raise InvalidArgument(f"inputs[{index}].name", each.name, f"at most {MAX_NAME_CHARS} characters")
        if each.name in found:
            raise InvalidArgument(f"inputs[{index}].name", each.name, "a name of its own")
        if each.parameters:
            # Shared memory, above all: the tensor is not in the request then.
            raise InvalidArgument(f"{each.name}.parameters", next(iter(each.parameters)), "none")
        found[each.name] = _read(each, raw[index] if raw else None)
    return found


def add_output(response: pb.ModelInferResponse, tensor: Tensor, *, as_raw: bool) -> None:
    """A tensor with one dimension."""
    shape = [len(tensor.elements)]
    output = response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=shape)
    field, dtype = DATATYPES[tensor.datatype]
    encoded = [text.encode("utf-8", "replace") for text in tensor.elements] if not dtype else tensor.elements
    if not as_raw:
        getattr(output.contents, field).extend(encoded)
    elif dtype:
        response.raw_output_contents.append(np.asarray(encoded, dtype).tobytes())
    else:
        response.raw_output_contents.append(b"".join(_LENGTH.pack(len(text)) + text for text in encoded))


def _read(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None) -> Tensor:
    name = tensor.name
    if tensor.datatype not in DATATYPES:
        raise InvalidArgument(f"{name}.datatype", tensor.datatype, f"one of {', '.join(DATATYPES)}")
    count = _count(name, tensor.shape)
    if raw is None:
        elements = _typed_elements(tensor)
    elif tensor.HasField("contents"):
        raise InvalidArgument(f"{name}.contents", "contents", "none beside raw_input_contents")
    else:
        elements = _raw_elements(name, tensor.datatype, raw)
    if len(elements) != count:
        raise InvalidArgument(f"{name}.shape", list(tensor.shape), f"that of its {len(elements)} elements")
    if tensor.datatype == BYTES:
        elements = [_text(name, element) for element in elements]
    elif tensor.datatype == "FP32":
        elements = [shortest(element) for element in elements]
    return Tensor(name, tensor.datatype, elements)


def _count(name: str, shape: Sequence[int]) -> int:
    """The elements of a tensor of that shape."""
    if not 0 < len(shape) <= MAX_DIMENSIONS or min(shape) < 0:
        raise InvalidArgument(
            f"{name}.shape", list(shape[:MAX_DIMENSIONS]), f"1 to {MAX_DIMENSIONS} sizes, none below 0"
        )
    if (count := math.prod(shape)) > MAX_ELEMENTS:
        raise InvalidArgument(f"{name}.shape", list(shape), f"at most {MAX_ELEMENTS} elements")
    return count


def _typed_elements(tensor: pb.ModelInferRequest.InferInputTensor) -> Sequence[Any]:
    field, _ = DATATYPES[tensor.datatype]
    if not field:
        raise InvalidArgument(f"{tensor.name}.datatype", tensor.datatype, "one that contents can hold; or raw contents")
    elements: Sequence[Any] = getattr(tensor.contents, field)
    return elements[: MAX_ELEMENTS + 1]


def _raw_elements(name: str, datatype: str, raw: bytes) -> Sequence[Any]:
    _, dtype = DATATYPES[datatype]
    if not dtype:
        return _raw_texts(name, raw)
    size = np.dtype(dtype).itemsize
    if len(raw) % size or len(raw) > size * MAX_ELEMENTS:
        raise InvalidArgument(name, f"{len(raw)} raw bytes", f"elements of {size} bytes, at most {MAX_ELEMENTS}")
    elements: list[Any] = np.frombuffer(raw, dtype).tolist()
    return elements


def _raw_texts(name: str, raw: bytes) -> list[bytes]:
    texts: list[bytes] = []
    at = 0
    while at < len(raw):
        start = at + _LENGTH.size
        at = start + _LENGTH.unpack_from(raw, at)[0] if start <= len(raw) else start
        if at > len(raw) or len(texts) == MAX_ELEMENTS:
            raise InvalidArgument(name, f"{len(raw)} raw bytes", "texts, each after its length in four bytes")
        texts.append(raw[start:at])
    return texts


def _text(name: str, element: bytes) -> str:
    try:
        return element.decode()
    except UnicodeDecodeError:
        raise InvalidArgument(name, element[:32], "UTF-8") from None
