"""A GGUF file: its metadata as plain Python values, its tensors dequantized to float32.

Layout (little endian; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md):

    "GGUF" | version u32 | tensor count u64 | entry count u64 | entries | tensor table | padding | tensor bytes

The header is read here and not by the gguf package's reader: that one trusts the counts in the file (a flipped bit in
an array's length makes it loop without end) and needs seconds for a vocabulary. Here every read is checked against the
file's end. Block formats and dequantization are the gguf package's.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf.quants import quant_shape_to_byte_shape

from engine.errors import ModelFileError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 1 << 16
STRING, ARRAY = 8, 9
# Value type → struct and numpy code, as numbered by the format.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One line of the tensor table. `shape` has the rows first, as in numpy; `offset` is from the file's start."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    byte_shape: tuple[int, ...]
    offset: int

    @property
    def byte_count(self) -> int:
        return math.prod(self.byte_shape)


class GGUFFile:
    """Opened on construction, which checks header and tensor table. Raises ModelFileError for anything unsound."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if path.stat().st_size < len(MAGIC):
                raise ModelFileError(path, "not a GGUF file: too short")
            self._bytes = np.memmap(path, mode="r", dtype=np.uint8)
        except OSError as error:
            raise ModelFileError(path, f"cannot be opened: {error.strerror}") from error
        cursor = _Cursor(path, self._bytes.data)
        self.metadata, self.tensors = _read_header(cursor)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """The named tensor, dequantized, in its `shape`. The rows are as in the file (see `unpermute`)."""
        entry = self.tensors[name]
        raw = self._bytes[entry.offset : entry.offset + entry.byte_count].reshape(entry.byte_shape)
        try:
            # The package takes plain float types as such, and all block formats as bytes.
            values = gguf.dequantize(_typed(raw, entry), entry.kind)
        except NotImplementedError as error:
            raise ModelFileError(self.path, f"tensor {name}: format {entry.kind.name} is not supported") from error
        return np.asarray(values, dtype=np.float32).reshape(entry.shape)


def unpermute(rows: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Undoes what conversion to GGUF does to the q and k rows of Llama-family models.

    Such files hold each head's rows as (pair, half) for rotary embedding of neighbouring elements; the half-split
    form used here wants (half, pair). `rows` is [num_heads * head_dim, ...].
    """
    pairs = rows.shape[0] // num_heads // 2
    return rows.reshape(num_heads, pairs, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


class _Cursor:
    """Reads forward through the header, never past the file's end."""

    def __init__(self, path: Path, view: memoryview) -> None:
        self.path = path
        self.view = view
        self.position = 0

    def take(self, byte_count: int) -> memoryview:
        if byte_count > len(self.view) - self.position:
            raise self.error(f"truncated: {byte_count} bytes wanted at byte {self.position} of {len(self.view)}")
        piece = self.view[self.position : self.position + byte_count]
        self.position += byte_count
        return piece

    def scalar(self, code: str) -> Any:  # noqa: ANN401 - the format's own choice of types
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        piece = self.take(self.scalar("Q"))
        try:
            return str(piece, encoding="utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"corrupt: invalid UTF-8 before byte {self.position}") from error

    def name(self) -> str:
        name = self.string()
        if len(name) > MAX_NAME_BYTES:
            raise self.error(f"corrupt: a name of {len(name)} characters")
        return name

    def value(self) -> Any:  # noqa: ANN401
        kind = self.scalar("I")
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self._array()
        if kind not in SCALARS:
            raise self.error(f"corrupt: unknown value type {kind} at byte {self.position}")
        return self.scalar(SCALARS[kind])

    def _array(self) -> list[Any]:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == STRING:
            # Each string takes its length's 8 bytes at least: a larger count is a lie, and would cost memory.
            if count > (len(self.view) - self.position) // 8:
                raise self.error(f"truncated or corrupt: {count} strings announced at byte {self.position}")
            return [self.string() for _ in range(count)]
        if kind not in SCALARS:
            raise self.error(f"corrupt: unknown array type {kind} at byte {self.position}")
        code = np.dtype("<" + SCALARS[kind])
        return list(np.frombuffer(self.take(count * code.itemsize), dtype=code).tolist())

    def error(self, problem: str) -> ModelFileError:
        return ModelFileError(self.path, problem)


def _read_header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    if cursor.take(len(MAGIC)) != MAGIC:
        raise cursor.error("not a GGUF file: it does not start with 'GGUF'")
    version = cursor.scalar("I")
    if version not in VERSIONS:
        raise cursor.error(f"GGUF version {version} is not supported; known: 2, 3 (little endian)")
    tensor_count, entry_count = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        key = cursor.name()
        metadata[key] = cursor.value()
    table = []
    for _ in range(tensor_count):
        table.append(_read_entry(cursor))
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise cursor.error(f"corrupt: alignment {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    tensors = {}
    for name, shape, kind, byte_shape, offset in table:
        entry = TensorEntry(name, shape, kind, byte_shape, start + offset)
        if entry.offset + entry.byte_count > len(cursor.view):
            end = entry.offset + entry.byte_count
            raise cursor.error(f"truncated: tensor {name} ends at byte {end}, the file at {len(cursor.view)}")
        tensors[name] = entry
    return metadata, tensors


def _read_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, tuple[int, ...], int]:
    """One line of the tensor table: name, shape, kind, shape in bytes, offset from the start of the tensor bytes."""
    name = cursor.name()
    dimensions = cursor.scalar("I")
    if not 0 < dimensions <= MAX_DIMENSIONS:
        raise cursor.error(f"corrupt: tensor {name!r} has {dimensions} dimensions")
    shape = tuple(reversed([cursor.scalar("Q") for _ in range(dimensions)]))
    kind_number, offset = cursor.scalar("I"), cursor.scalar("Q")
    try:
        kind = gguf.GGMLQuantizationType(kind_number)
        byte_shape = tuple(int(size) for size in quant_shape_to_byte_shape(shape, kind))
    except ValueError as error:
        raise cursor.error(f"corrupt: tensor {name!r}: {error}") from error
    return name, shape, kind, byte_shape, offset


def _typed(raw: npt.NDArray[np.uint8], entry: TensorEntry) -> npt.NDArray[Any]:
    floats: dict[gguf.GGMLQuantizationType, npt.DTypeLike] = {
        gguf.GGMLQuantizationType.F32: np.float32,
        gguf.GGMLQuantizationType.F16: np.float16,
    }
    return raw.view(floats[entry.kind]) if entry.kind in floats else raw
