"""Every parser of what comes from elsewhere, against bytes that are nearly right. `make fuzz` looks much longer."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import access_targets, call_targets, kserve_targets, kv_targets
from tests.fuzz.target import Target

TARGETS = (*kv_targets.TARGETS, *access_targets.TARGETS, *call_targets.TARGETS, *kserve_targets.TARGETS)
every_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)


@every_target
def test_good_examples_are_taken(target: Target):
    for seed in target.seeds():
        target.run(seed)


@cache
def seeds_of(target: Target) -> list[bytes]:
    """Once: keys and signatures are new each time."""
    return list(target.seeds())


@st.composite
def nearly(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A good example with some bytes changed, taken out or put in."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, len(data)))
        end = start + draw(st.sampled_from((0, 1, 1, 2, 4, 64)))
        data[start:end] = draw(st.binary(max_size=8))
    return bytes(data)


@every_target
@given(data=st.data())
def test_nothing_but_a_refusal_comes_of_bad_ones(target: Target, data: st.DataObject):
    target(data.draw(st.one_of(nearly(seeds_of(target)), st.binary(max_size=256))))
