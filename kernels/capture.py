"""Recording what a forward pass launches, to launch it again without Python in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

Result = TypeVar("Result")


class NotRecordable(Exception):
    """The work was done, but a replay would not do it again."""


class Capture(Protocol):
    """Records on one thread at a time."""

    def __call__(self, work: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """Runs `work` at least once, and writes down what it launches.

        Returns a function that launches the same again, on the same memory, and what `work` returned: tensors that
        every replay, of this and of other recordings, overwrites. Raises NotRecordable.
        """
        ...
