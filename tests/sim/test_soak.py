"""Days of virtual time with faults: everything is answered, and nothing grows."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.sim.soak import Sample, soak


@pytest.fixture
def nothing_is_logged() -> Iterator[None]:
    """pytest keeps what is logged until the test ends: a kilobyte for each of some thousand lines."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def mean(samples: list[Sample]) -> tuple[float, float, float]:
    count = len(samples)
    return (
        sum(sample.resident_bytes for sample in samples) / count,
        sum(sample.objects for sample in samples) / count,
        sum(sample.tasks for sample in samples) / count,
    )


def test_hours_leave_no_task_behind():
    world = soak(seed=1, hours=4, requests_each=30)
    assert world.served == 120
    assert world.deaths > 50
    assert len({sample.tasks for sample in world.samples[1:]}) == 1


@pytest.mark.nightly
@pytest.mark.usefixtures("nothing_is_logged")
def test_seven_days_leave_nothing_behind():
    """The last day against the second: the first fills the caches."""
    world = soak(seed=7, hours=7 * 24)
    (first_bytes, first_objects, first_tasks), last = mean(world.samples[24:48]), mean(world.samples[-24:])
    print(f"{world.served} requests, {world.deaths} deaths, {world.cuts} cuts, {world.freezes} freezes")
    print(
        f"resident {first_bytes / 1e6:.1f} MB, then {last[0] / 1e6:.1f} MB; objects {first_objects:.0f}, {last[1]:.0f}"
    )
    assert last[0] <= 1.02 * first_bytes
    assert last[1] <= 1.02 * first_objects
    assert last[2] <= first_tasks + 1
