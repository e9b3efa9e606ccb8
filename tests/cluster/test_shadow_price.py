"""The price of a pool's time: nothing while there is room, and under overload what lets in as much as can be done."""

from __future__ import annotations

import random
from itertools import accumulate

import pytest

from cluster.routing.price import MOST, ShadowPrice


def test_there_is_no_price_before_anything_was_seen_or_while_there_is_room() -> None:
    price = ShadowPrice(0.5)
    assert price.of(1.0, 1.0) == 0.0
    for second in range(100):
        price.saw(1.0, 0.2, float(second))
    assert price.of(1.0, 0.2) == 0.0
    assert price.of(1.0, 0.5) == 0.0
    assert price.of(1.0, 1.0) > 0.0, "a burst fills the pool at once"


def test_a_pool_that_stays_too_full_becomes_dearer_and_cheaper_again() -> None:
    price = ShadowPrice(0.5)
    seen = []
    for second in range(60):
        price.saw(random.Random(second).choice([0.1, 1.0]), 0.9 if second < 30 else 0.1, float(second))
        seen.append(price.of(1.0, 0.5))
    assert seen[0] == 0.0
    assert seen[29] > seen[10] > 0.0
    assert seen[59] == 0.0


@pytest.mark.parametrize("overload", [1.2, 2.0, 4.0])
def test_what_is_let_in_under_lasting_overload_is_the_lightest_that_fits(overload: float) -> None:
    """One server, works from 0.01 to 1 s, each worth one request; a queue of at most 2 s is of use."""
    rng = random.Random(3)
    price, queue_s, now = ShadowPrice(0.5), 0.0, 0.0
    works = [10 ** rng.uniform(-2, 0) for _ in range(6000)]
    gap_s = sum(works) / len(works) / overload
    accepted: list[float] = []
    for number, work_s in enumerate(works):
        now += gap_s
        queue_s = max(0.0, queue_s - gap_s)
        fill = queue_s / 2.0
        if fill < 1.0 and price.of(work_s, fill) < 1.0:
            queue_s += work_s
            if number > 2000:
                accepted.append(work_s)
        price.saw(work_s, fill, now)
    late = sorted(works[2001:])
    best = sum(done_s <= gap_s * len(late) for done_s in accumulate(late))
    assert len(accepted) > 0.93 * best
    assert sum(accepted) > 0.93 * gap_s * len(late), "the server is kept busy"


def test_where_all_bring_the_same_work_nobody_is_refused_for_the_next() -> None:
    price = ShadowPrice(0.5)
    for second in range(1000):
        price.saw(0.3, 2.0, float(second))
    assert price.of(0.3, 1.0) == pytest.approx(MOST)


def test_work_of_nothing_does_not_make_a_second_priceless() -> None:
    """The first row of an idle decode worker costs nobody anything: of such the range of prices cannot be made."""
    price = ShadowPrice(0.5)
    for second in range(40):
        price.saw(0.0 if second % 2 else 0.2, 0.9, float(second))
    assert price.of(0.2, 1.0) <= MOST
