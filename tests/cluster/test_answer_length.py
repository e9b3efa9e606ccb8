"""The mean length of answers, told while the long ones still run."""

from __future__ import annotations

import random

import pytest

from cluster.routing.answer_length import AnswerLength

SHORT, LONG, SHARE_LONG = 20, 900, 0.3
MEAN = (1 - SHARE_LONG) * SHORT + SHARE_LONG * LONG


def seen(steps: int) -> tuple[float, float]:
    """(the estimate, the mean of answers that have ended) when two answers begin in each step, which is one token for
    all of them."""
    rng = random.Random(1)
    answers, left, ended = AnswerLength(50.0), list[tuple[int, int]](), list[int]()
    for _ in range(steps):
        left += [(length, length) for length in rng.choices((SHORT, LONG), (1 - SHARE_LONG, SHARE_LONG), k=2)]
        answers.drew(len(left))
        left = [(length, rest - 1) for length, rest in left]
        done = [length for length, rest in left if not rest]
        ended += done
        answers.ended(len(done))
        left = [row for row in left if row[1]]
    return answers.mean, sum(ended) / len(ended)


def test_short_answers_that_end_first_do_not_make_all_short() -> None:
    estimate, ended = seen(LONG - 100)
    assert ended == SHORT
    assert estimate == pytest.approx(MEAN, rel=0.35)


def test_it_settles_where_the_mean_is() -> None:
    estimate, _ = seen(6 * LONG)
    assert estimate == pytest.approx(MEAN, rel=0.1)


def test_the_guess_is_forgotten() -> None:
    answers = AnswerLength(1e6)
    assert answers.mean == 1e6
    for _ in range(3000):
        answers.drew(7)
        answers.ended(1)
    assert answers.mean == pytest.approx(7, rel=0.1)


def test_what_is_broken_off_counts_as_far_as_it_came() -> None:
    answers = AnswerLength(10.0)
    before = answers.mean
    answers.drew(100)
    assert answers.mean > before
