"""A worker is given up when it dies again and again, and not for having died often in a long time."""

from __future__ import annotations

from cluster.restarts import STEADY_S, Restarts


def test_so_often_in_a_row() -> None:
    restarts = Restarts(2, 0.0)
    assert [restarts.died(now) for now in (1.0, 2.0, 3.0)] == [True, True, False]


def test_a_long_life_is_a_good_start() -> None:
    restarts, now = Restarts(2, 0.0), 0.0
    for _ in range(100):
        now += STEADY_S
        assert restarts.died(now)
        assert restarts.left == 1
    assert restarts.died(now + 1)
    assert not restarts.died(now + 2)


def test_none_at_all() -> None:
    assert not Restarts(0, 0.0).died(1.0)
