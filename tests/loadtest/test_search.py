"""The bisection on rate."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.loadtest.search import LOWEST_SHARE, GoodputSearch


def searched(search: GoodputSearch, threshold: float) -> GoodputSearch:
    while (rate := search.next_rps()) is not None:
        search.add(rate, 0.95 if rate <= threshold else 0.5)
    return search


@given(threshold=st.floats(0.05, 500.0), start=st.floats(0.5, 50.0))
def test_a_threshold_is_found_from_wherever_the_search_starts(threshold: float, start: float) -> None:
    search = searched(GoodputSearch(start, max_probes=40), threshold)
    if threshold < LOWEST_SHARE * start * 2:
        # Perhaps too far below the start; if anything is claimed, it is true.
        assert search.passed_rps <= threshold
        return
    assert search.passed_rps <= threshold <= search.passed_rps * 1.0501
    assert search.is_bracketed


def test_nothing_passes() -> None:
    search = searched(GoodputSearch(8.0), 0.0)
    assert search.passed_rps == 0.0
    assert not search.is_bracketed
    assert [rate for rate, _ in search.probes] == [8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125]


def test_the_number_of_probes_is_bounded() -> None:
    search = searched(GoodputSearch(1.0, max_probes=4), 1e9)
    assert [rate for rate, _ in search.probes] == [1.0, 2.0, 4.0, 8.0]
    assert search.passed_rps == 8.0
    assert not search.is_bracketed


def test_exactly_enough_is_enough() -> None:
    search = GoodputSearch(1.0, target=0.9)
    search.add(1.0, 0.9)
    assert search.passed_rps == 1.0
    assert search.next_rps() == 2.0


@pytest.mark.parametrize(("rates", "expected"), [((1.0, 2.0), 1.5), ((1.0, 2.0, 1.5), 1.25)])
def test_the_middle_is_tried_next(rates: tuple[float, ...], expected: float) -> None:
    search = GoodputSearch(1.0)
    for rate in rates:
        search.add(rate, 1.0 if rate <= 1.0 else 0.0)
    assert search.next_rps() == expected
