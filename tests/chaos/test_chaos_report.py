"""The report: what counts as right, and how long streams stood still."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from cluster.chaos.clients import Asked, Reference
from cluster.chaos.faults import Happened
from cluster.chaos.load import Load
from cluster.chaos.report import ChaosReport, make_report

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


def report(
    requests: Sequence[Asked],
    faults: Sequence[Happened] = (),
    leaks: tuple[str, ...] = (),
    held_s: dict[str, float] | None = None,
    flips: int = 0,
    unread: int = 0,
    kv_faults: int = 0,
) -> ChaosReport:
    load = Load(tuple(requests), leaks, 60.0)
    return make_report(load, faults, held_s or {}, lease_s=10.0, flips=flips, unread=unread, kv_faults=kv_faults)


def test_recovery_is_from_the_fault_to_the_next_token() -> None:
    faults = [Happened("kill", "d", 1.5), Happened("corrupt", "p", 2.0), Happened("stop", "p", 50.0)]
    found = report([asked(1.0, 4.0, 4.1, 4.2, retries=1), asked(1.0, 1.1, 1.2, 1.3)], faults)
    assert found.recovery_s == {"kill": (2.5,)}
    assert found.longest_pause_s == 3.0
    assert (found.requests, found.finished, found.retried, found.wrong) == (2, 2, 1, 0)
    assert found.faults == {"kill": 1, "corrupt": 1, "stop": 1}
    assert found.is_clean
    assert found.lines()[0] == "60 s: 1 × kill, 1 × corrupt, 1 × stop"
    assert "kill: to the next token of 1 streams that it hit p50 2.50 s, p90 2.50 s, p99 2.50 s" in found.lines()
    assert found.as_json()["recovery_by_fault"] == {"kill": {"streams": 1, "p50": 2.5, "p90": 2.5, "p99": 2.5}}


def test_a_request_that_was_retried_before_its_first_token() -> None:
    found = report([asked(3.0, 3.1, 3.2, 3.3, retries=1)], [Happened("kill", "p", 1.0)])
    assert found.recovery_s == {"kill": (2.0,)}


def test_a_request_that_was_sent_to_a_worker_that_was_away() -> None:
    late = asked(7.5, 7.6, 7.7, 7.8, retries=1)
    late.sent_s = 6.0
    found = report([late], [Happened("partition", "p", 5.0, 15.0)])
    assert found.recovery_s == {"partition": (1.5,)}


def test_what_is_not_clean() -> None:
    good, failed = asked(1, 2, 3, 4), asked(1, 2, error="UNAVAILABLE: gone")
    assert report([good]).is_clean
    assert not report([good, failed]).is_clean
    assert not report([good], leaks=("decode-0 holds 3 blocks",)).is_clean
    assert report([good], held_s={"stop": 9.9}).is_clean
    assert not report([good], held_s={"stop": 10.1}).is_clean
    cut = report([asked(1, 2)])
    assert (cut.wrong, cut.is_clean) == (1, False)
    found = report([good, failed])
    assert found.errors == {"UNAVAILABLE: gone": 1}
    assert found.as_json()["finished"] == 1
    assert found.as_json()["recovery_s"] == {"p50": 0.0, "p90": 0.0, "p99": 0.0}


def test_a_flip_that_nobody_noticed_is_not_clean() -> None:
    corrupt, kill = Happened("corrupt", "p", 0.0, 60.0), Happened("kill", "d", 9.0)
    good = asked(1, 2, 3, 4)
    assert report([good], [corrupt], flips=7, kv_faults=7).is_clean
    assert not report([good], [corrupt], flips=7, kv_faults=6).is_clean
    assert not report([good], [corrupt], flips=7, kv_faults=8).is_clean
    assert report([good], [corrupt], flips=7, unread=1, kv_faults=6).is_clean
    assert report([good], [corrupt], flips=7, unread=1, kv_faults=7).is_clean, "it was read before its reader left"
    assert not report([good], [corrupt], flips=7, unread=1, kv_faults=5).is_clean
    assert report([good], [corrupt, kill], flips=7, kv_faults=6).is_clean, "it was on its way to a worker that died"
    shown = "7 bits flipped, 1 of them in streams that were left before their end; 6 damaged KV frames reported"
    assert shown in report([good], [corrupt], flips=7, unread=1, kv_faults=6).lines()
