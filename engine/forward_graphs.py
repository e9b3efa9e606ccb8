"""Forward passes recorded once and replayed: hundreds of kernels run by one call from Python.

Two kinds of batch are recorded, each at its own shapes:

    decode    every row brings one token and is sampled from; padded to the next of `decode_rows` rows (a CPU has them
              all: there, padding costs more than another recording)
    chunk     one row of exactly one of `chunk_tokens` tokens; a recording per layer group, so that each is announced

and every other batch runs as it is. Block tables are padded to the next power of two: with the shape, all that a kernel
gets from the host is fixed, and what differs from step to step lies in the packed inputs.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engine.batch import Row
from engine.forward import AfterGroup, Forward
from engine.model import Hidden
from engine.step_inputs import StepInputs, StepShape, shape_of, view_step
from kernels.capture import Capture, NotRecordable

logger = logging.getLogger(__name__)

# Padded sizes up to 16 double, beyond they grow by 16: at most 16 rows are computed for nothing.
SMALL_ROWS = (1, 2, 4, 8, 16)
# Block tables are at least this wide: 1,024 tokens of 16 to a block are one shape.
MIN_BLOCKS = 64


@dataclass(frozen=True, slots=True, eq=False)
class _Recording:
    """`inputs` are read by every replay. Each piece is a replay and the layers that are done after it."""

    inputs: StepInputs
    pieces: tuple[tuple[Callable[[], None], range], ...]
    logits: torch.Tensor


class GraphedForward:
    """A Forward for one device that replays where it can. Not for several threads."""

    def __init__(
        self, forward: Forward, capture: Capture, decode_rows: Sequence[int], chunk_tokens: Sequence[int] = ()
    ) -> None:
        self._forward = forward
        self._capture = capture
        self._block_size = forward.block_size
        self._decode_rows = tuple(sorted(decode_rows))
        self._chunk_tokens = frozenset(chunk_tokens)
        self._recordings: dict[StepShape, _Recording | None] = {}  # None: cannot be recorded

    @property
    def vocab_size(self) -> int:
        return self._forward.vocab_size

    @property
    def recorded_count(self) -> int:
        return sum(recording is not None for recording in self._recordings.values())

    def shape_of(self, rows: Sequence[Row]) -> StepShape:
        """The shape to pack these rows into: padded where a recording serves them."""
        exact = shape_of(rows, self._block_size)
        shape = exact.attention
        blocks = max(MIN_BLOCKS, 1 << (shape.blocks - 1).bit_length())
        if shape.tokens == shape.rows == exact.samples:
            index = bisect_left(self._decode_rows, shape.rows)
            return exact if index == len(self._decode_rows) else exact.padded(self._decode_rows[index], blocks)
        if shape.rows == 1 and shape.tokens in self._chunk_tokens:
            return exact.padded(1, blocks)
        return exact

    def run(self, inputs: StepInputs, after_group: AfterGroup) -> torch.Tensor:
        """As `Forward.run`. The logits of a replay are overwritten by the next one."""
        if not self._is_recordable(inputs.shape):
            return self._forward.run(inputs, after_group)
        if inputs.shape not in self._recordings:
            self._recordings[inputs.shape] = recording = self._try_to_record(inputs)
            if recording is not None:
                for _, layers in recording.pieces:
                    after_group(layers.start, layers.stop)
                return recording.logits
        recording = self._recordings[inputs.shape]
        if recording is None:
            return self._forward.run(inputs, after_group)
        recording.inputs.packed.copy_(inputs.packed, non_blocking=True)
        for replay, layers in recording.pieces:
            replay()
            after_group(layers.start, layers.stop)
        return recording.logits

    def _is_recordable(self, shape: StepShape) -> bool:
        rows, tokens = shape.attention.rows, shape.attention.tokens
        if tokens == rows == shape.samples:
            return rows in self._decode_rows
        return rows == 1 and tokens in self._chunk_tokens

    def _try_to_record(self, inputs: StepInputs) -> _Recording | None:
        try:
            return self._record(inputs)
        except NotRecordable as problem:
            logger.info("batches of %d rows are not recorded: %s", inputs.shape.attention.rows, problem)
            return None

    def _record(self, inputs: StepInputs) -> _Recording:
        """Runs these inputs for real, and records the same."""
        # A copy: the recording's inputs live as long as it does, and nobody else writes them.
        packed = inputs.packed.clone()
        inputs = view_step(packed, inputs.shape, self._block_size, inputs.attention.spans)
        groups = list(self._forward.groups)
        if inputs.shape.attention.tokens == inputs.shape.samples:
            replay, whole = self._capture(lambda: self._forward.run(inputs, _nobody))
            return _Recording(inputs, ((replay, range(groups[0].start, groups[-1].stop)),), whole)
        pieces: list[tuple[Callable[[], None], range]] = []
        hidden: Hidden | None = None
        logits: torch.Tensor | None = None
        for layers in groups:
            piece = self._capture(self._piece(inputs, hidden, layers, layers is groups[-1]))
            pieces.append((piece[0], layers))
            hidden, logits = piece[1]
        assert logits is not None, "the last group gives the logits"
        return _Recording(inputs, tuple(pieces), logits)

    def _piece(
        self, inputs: StepInputs, hidden: Hidden | None, layers: range, is_last: bool
    ) -> Callable[[], tuple[Hidden, torch.Tensor | None]]:
        """One layer group's work: the first one embeds, the last one ends in logits."""

        def work() -> tuple[Hidden, torch.Tensor | None]:
            before = self._forward.embed(inputs) if hidden is None else hidden
            after = self._forward.group(before, layers, inputs)
            return after, self._forward.logits(after, inputs) if is_last else None

        return work


def padded_rows(max_rows: int) -> tuple[int, ...]:
    """The sizes to pad decode batches of up to `max_rows` rows to."""
    beyond = range(32, max_rows + 16, 16)
    return (*(size for size in SMALL_ROWS if size < 2 * max_rows), *beyond)


def _nobody(first: int, end: int) -> None:
    """While recording there is nothing to announce."""
