"""Processes side by side."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator

import pytest

from cluster.planning.forked import forked

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def deaf() -> Iterator[None]:
    """Somebody in this process has asked to survive SIGTERM, as services do."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    yield
    signal.signal(signal.SIGTERM, before)


def test_answers_come_in_order() -> None:
    offset = 7
    with forked(lambda number: number + offset, 2) as each:
        assert list(each(range(5))) == [7, 8, 9, 10, 11]


@pytest.mark.usefixtures("deaf")
def test_it_ends_in_a_process_that_survives_sigterm() -> None:
    with forked(abs, 2) as each:
        assert list(each([-1, 1])) == [1, 1]


def test_what_goes_wrong_there_goes_wrong_here() -> None:
    with pytest.raises(ZeroDivisionError), forked(lambda number: 1 // number, 2) as each:
        list(each([1, 0]))


class _Garbage:
    """Is only ever collected, never let go: it holds itself."""

    collected = 0

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        _Garbage.collected += 1


def _collected_there(_: int) -> int:
    gc.collect()
    return _Garbage.collected


def test_what_was_thrown_away_before_is_not_collected_there() -> None:
    """Channels and servers of gRPC crash a process that they were not made in."""
    gc.disable()
    try:
        _Garbage()
        with forked(_collected_there, 1) as each:
            assert list(each([1])) == [0]
    finally:
        gc.enable()
        gc.collect()
    assert _Garbage.collected == 1
