"""What one call of the sampling kernels reads besides logits: one packed tensor, so that a device gets it in one copy.

Every section begins at a multiple of 16 bytes: a kernel is then compiled for aligned pointers once, not once for each
alignment that turns up. Two inputs of equal shape lead to the same launches, so one may be copied over the other in
place, and a recorded CUDA graph replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

WORD_BYTES = 4
ALIGNED_WORDS = 4


@dataclass(frozen=True, slots=True)
class SampleShape:
    """`biased` tokens are to be changed by `biases` numbers, no more than `biases_each` to a token; `histories` rows
    have penalties, which count `history_ids` tokens, no more than `history_each` to a row; of `logprob_rows` rows and
    their `logprob_draws` draws the log-probabilities are wanted, and those of the `top` likeliest tokens.

    The booleans say whether any row draws (is not greedy), and cuts by top_k, and by top_p.
    """

    rows: int
    draws: int
    biased: int = 0
    biases: int = 0
    biases_each: int = 0
    histories: int = 0
    history_ids: int = 0
    history_each: int = 0
    logprob_rows: int = 0
    logprob_draws: int = 0
    top: int = 0
    any_noise: bool = False
    any_top_k: bool = False
    any_top_p: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class SampleInputs:
    """Sections of a packed tensor; int32 unless said.

    Padding of the biased tokens has row -1. `bias_ends` are indices into `biases`: token b's are those from
    bias_ends[b - 1] (or 0) to bias_ends[b]. The history of the row history_rows[h] is history_ids[start : end], of
    which the model wrote what comes from `outputs` on. Whatever `history_ids` holds beyond is padding.
    """

    shape: SampleShape
    packed: torch.Tensor
    keys: torch.Tensor  # [draws] int64, the 64 bits of engine/random_draw.py's key
    logprob_rows: torch.Tensor  # [logprob_rows] int64
    logprob_draws: torch.Tensor  # [logprob_draws] int64
    logprob_lines: torch.Tensor  # [logprob_draws] int64, indices into logprob_rows
    draw_rows: torch.Tensor  # [draws]
    temperatures: torch.Tensor  # [rows] float32; 0 for greedy rows
    top_k: torch.Tensor  # [rows]; 0 for no limit
    top_p: torch.Tensor  # [rows] float32; 1 for no limit
    min_p_cuts: torch.Tensor  # [rows], see kernels/gpu/sample_cuts.py
    biased_rows: torch.Tensor  # [biased]
    biased_ids: torch.Tensor  # [biased]
    bias_ends: torch.Tensor  # [biased]
    biases: torch.Tensor  # [biases] float32
    history_rows: torch.Tensor  # [histories]
    history_starts: torch.Tensor  # [histories]
    history_outputs: torch.Tensor  # [histories]
    history_ends: torch.Tensor  # [histories]
    repetition: torch.Tensor  # [histories] float32
    presence: torch.Tensor  # [histories] float32
    frequency: torch.Tensor  # [histories] float32
    history_ids: torch.Tensor  # [history_ids]

    def on(self, device: torch.device) -> SampleInputs:
        """The same on a device; from pinned memory the copy does not wait."""
        return view_inputs(self.packed.to(device, non_blocking=True), self.shape)


class _Section(NamedTuple):
    dtype: torch.dtype
    count: Callable[[SampleShape], int]


_SECTIONS = {
    "keys": _Section(torch.int64, lambda shape: shape.draws),
    "logprob_rows": _Section(torch.int64, lambda shape: shape.logprob_rows),
    "logprob_draws": _Section(torch.int64, lambda shape: shape.logprob_draws),
    "logprob_lines": _Section(torch.int64, lambda shape: shape.logprob_draws),
    "draw_rows": _Section(torch.int32, lambda shape: shape.draws),
    "temperatures": _Section(torch.float32, lambda shape: shape.rows),
    "top_k": _Section(torch.int32, lambda shape: shape.rows),
    "top_p": _Section(torch.float32, lambda shape: shape.rows),
    "min_p_cuts": _Section(torch.int32, lambda shape: shape.rows),
    "biased_rows": _Section(torch.int32, lambda shape: shape.biased),
    "biased_ids": _Section(torch.int32, lambda shape: shape.biased),
    "bias_ends": _Section(torch.int32, lambda shape: shape.biased),
    "biases": _Section(torch.float32, lambda shape: shape.biases),
    "history_rows": _Section(torch.int32, lambda shape: shape.histories),
    "history_starts": _Section(torch.int32, lambda shape: shape.histories),
    "history_outputs": _Section(torch.int32, lambda shape: shape.histories),
    "history_ends": _Section(torch.int32, lambda shape: shape.histories),
    "repetition": _Section(torch.float32, lambda shape: shape.histories),
    "presence": _Section(torch.float32, lambda shape: shape.histories),
    "frequency": _Section(torch.float32, lambda shape: shape.histories),
    "history_ids": _Section(torch.int32, lambda shape: shape.history_ids),
}
assert ["shape", "packed", *_SECTIONS] == [field.name for field in fields(SampleInputs)]


def empty_inputs(shape: SampleShape, pinned: bool = False) -> SampleInputs:
    """In host memory, to be filled."""
    words = sum(_words(section, shape) for section in _SECTIONS.values())
    return view_inputs(torch.empty(words, dtype=torch.int32, pin_memory=pinned), shape)


def view_inputs(packed: torch.Tensor, shape: SampleShape) -> SampleInputs:
    """The sections of a packed int32 tensor, on whatever device it is."""
    views: dict[str, torch.Tensor] = {}
    begin = 0
    for name, section in _SECTIONS.items():
        used = section.count(shape) * section.dtype.itemsize // WORD_BYTES
        views[name] = packed[begin : begin + used].view(section.dtype)
        begin += _words(section, shape)
    assert begin == packed.numel(), f"{packed.numel()} words for a shape of {begin}"
    return SampleInputs(shape=shape, packed=packed, **views)


def _words(section: _Section, shape: SampleShape) -> int:
    """Of a section and what aligns the next."""
    used = section.count(shape) * section.dtype.itemsize // WORD_BYTES
    return -(-used // ALIGNED_WORDS) * ALIGNED_WORDS
