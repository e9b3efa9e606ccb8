"""The report: what counts as right, and how long streams stood still."""

from __future__ import annotations

import pytest

from cluster.chaos.clients import Asked, Reference
from cluster.chaos.faults import Happened
from cluster.chaos.report import make_report

REFERENCE = Reference("prompt", (1, 2, 3, 4), (0.5, 1e-5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("token_ids", "is_whole", "agrees"),
    [
        ((1, 2, 3, 4), True, True),
        ((1, 2, 3), True, False),
        ((1, 2, 3), False, True),
        ((1, 2, 3, 4, 5), True, False),
        ((9, 2, 3, 4), True, False),
        ((1, 9, 9, 9), True, True),
        ((1, 2, 9, 4), True, False),
    ],
)
def test_an_answer_is_right_up_to_a_tie(token_ids: tuple[int, ...], is_whole: bool, agrees: bool) -> None:
    assert REFERENCE.agrees(token_ids, is_whole=is_whole) == agrees


def asked(*token_s: float, retries: int = 0, error: str = "") -> Asked:
    return Asked(REFERENCE, 0.0, list(REFERENCE.token_ids[: len(token_s)]), list(token_s), retries, error)


def test_recovery_is_from_the_fault_to_the_next_token() -> None:
    faults = [Happened("kill", "d", 1.5), Happened("stop", "p", 50.0)]
    report = make_report([asked(1.0, 4.0, 4.1, 4.2, retries=1), asked(1.0, 1.1, 1.2, 1.3)], faults, [], 60.0)
    assert report.recovery_s == (2.5,)
    assert (report.requests, report.finished, report.retried, report.wrong) == (2, 2, 1, 0)
    assert report.faults == {"kill": 1, "stop": 1}
    assert report.is_clean
    assert report.lines()[0] == "60 s: 1 × kill, 1 × stop"


def test_a_request_that_was_retried_before_its_first_token() -> None:
    report = make_report([asked(3.0, 3.1, 3.2, 3.3, retries=1)], [Happened("kill", "p", 1.0)], [], 60.0)
    assert report.recovery_s == (2.0,)


def test_what_is_not_clean() -> None:
    good, failed = asked(1, 2, 3, 4), asked(1, 2, error="UNAVAILABLE: gone")
    assert not make_report([good, failed], [], [], 1.0).is_clean
    assert not make_report([good], [], ["decode-0 holds 3 blocks"], 1.0).is_clean
    cut = make_report([asked(1, 2)], [], [], 1.0)
    assert (cut.wrong, cut.is_clean) == (1, False)
    report = make_report([good, failed], [], [], 1.0)
    assert report.errors == {"UNAVAILABLE: gone": 1}
    assert report.as_json()["finished"] == 1
    assert report.as_json()["recovery_s"] == {"p50": 0.0, "p90": 0.0, "p99": 0.0}
