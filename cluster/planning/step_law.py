"""How long a step takes on one kind of worker, before any correction: what every source of times offers alike.

    OperatorLaw    a sum of operator terms on a device profile        cluster/planning/operator_law.py
    MeasuredLaw    fitted to whole steps of the running device        cluster/planning/measured_law.py
    DistServeLaw   DistServe's published fits                         cluster/planning/distserve_profile.py

cluster/planning/cost_model.py puts the correction, and the questions that others ask, around one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cluster.planning.model_shape import ModelShape
from engine.step_cost import StepWork

# Numbers below 2^5 are kept exactly; above, every octave is cut into 16 cells.
EXACT_BITS = 5


class StepLaw(Protocol):
    """Seconds of one forward pass, drawing its tokens included. Both answers are non-negative and memoised inside."""

    def decode_s(self, rows: int, context_tokens: int) -> float:
        """A step of `rows` > 0 decode rows alone, which read `context_tokens` of KV together."""
        ...

    def prompt_s(self, work: StepWork) -> float:
        """A step with at least one prompt row, its decode rows included. At least the `decode_s` of those alone."""
        ...


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What is fixed about one worker, beside its law.

    `kv_capacity_tokens`: over all of its tp · pp devices together. `loop_step_s`, `loop_row_s`: what its own loop takes
    per step, and per row in it. `prefill_noise`, `decode_noise`: measured ratios of actual to predicted times of steps
    with and without prompts; () where nobody measured. `link_bytes_s`: what one of its devices sends, None: unknown.
    """

    model: ModelShape
    kv_capacity_tokens: int
    element_bytes: int = 2
    tp: int = 1
    pp: int = 1
    loop_step_s: float = 0.0
    loop_row_s: float = 0.0
    prefill_noise: tuple[float, ...] = ()
    decode_noise: tuple[float, ...] = ()
    link_bytes_s: float | None = None


class Interpolated:
    """A smooth function of a positive integer, computed at few places: exactly below 2^EXACT_BITS, above by straight
    lines over cells of 1/16 to 1/32 of the argument. One look-up when the cell is known."""

    def __init__(self, function: Callable[[int], float]) -> None:
        self._function = function
        self._cells: dict[int, tuple[int, float, float]] = {}

    def __call__(self, x: int) -> float:
        shift = x.bit_length() - EXACT_BITS
        key = (shift << EXACT_BITS) | (x >> shift) if shift > 0 else x
        cell = self._cells.get(key)
        if cell is None:
            cell = self._cells[key] = self._cell(x, max(shift, 0))
        low, value, slope = cell
        return value + slope * (x - low)

    def _cell(self, x: int, shift: int) -> tuple[int, float, float]:
        if not shift:
            return x, self._function(x), 0.0
        low, width = x >> shift << shift, 1 << shift
        value = self._function(low)
        return low, value, (self._function(low + width) - value) / width
