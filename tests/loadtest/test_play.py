"""The open loop and what it measures, on virtual time: to the exact moment."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from cluster.loadtest.play import LEAD_S, play
from cluster.loadtest.record import Record, from_json, to_json
from cluster.loadtest.target import Finished, Tokens
from cluster.planning import virtual_loop
from engine.errors import DeadlineExceeded, Overloaded, Unavailable
from engine.objectives import Objectives
from tests.loadtest.fake_targets import Script, ScriptedTarget, answer, at

GOAL = Objectives(0.2, 0.05)


def played(target: ScriptedTarget, requests=None, **changes: object) -> list[Record]:
    settings = {"objectives": GOAL, "timeout_s": 100.0, **changes}
    return virtual_loop.run(play(target, requests or at(0.0, 0.5, 0.75), **settings))


def test_requests_are_sent_when_due_though_none_before_them_has_ended() -> None:
    target = ScriptedTarget(lambda index: answer(50.0, 1.0, 2))
    records = played(target, at(0.0, 0.5, 0.5, 0.75))
    assert [time for time, _, _ in target.sent] == pytest.approx([LEAD_S, LEAD_S + 0.5, LEAD_S + 0.5, LEAD_S + 0.75])
    assert [record.index for record in records] == [0, 1, 2, 3]
    assert all(record.late_s == pytest.approx(0.0, abs=1e-12) for record in records)
    assert records[3].done_s == pytest.approx(0.75 + 51.0)


def test_times_and_tokens() -> None:
    script: Script = [
        (0.1, Tokens(1)),
        (0.03, Tokens(3)),
        (0.05, Tokens(1)),
        (0.2, Finished(7, 2, 5, {"prefill_s": 0.05})),
    ]
    record = played(ScriptedTarget(lambda index: script))[0]
    assert record.ending == "answered"
    assert record.ttft_s == pytest.approx(0.1)
    # Five tokens, 80 ms from the first to the last; two gaps, though the second chunk held three tokens.
    assert record.tpot_s == pytest.approx(0.02)
    assert record.gaps_s == pytest.approx((0.03, 0.05))
    assert record.end_s == pytest.approx(0.38)
    assert (record.prompt_tokens, record.cached_tokens, record.output_tokens) == (7, 2, 5)
    assert record.receipt == {"prefill_s": 0.05}
    assert record.is_met(GOAL)
    assert not record.is_met(Objectives(0.099, 0.05))
    assert not record.is_met(Objectives(0.2, 0.019))


def test_tokens_are_counted_by_chunks_where_the_server_says_nothing() -> None:
    record = played(ScriptedTarget(lambda index: [(0.1, Tokens(1)), (0.1, Tokens(2)), (0, Finished())]))[0]
    assert record.output_tokens == 3
    assert record.tpot_s == pytest.approx(0.05)
    assert record.prompt_tokens == 4


def test_one_token_has_no_tpot_and_meets_any() -> None:
    record = played(ScriptedTarget(lambda index: answer(0.1, 0.0, 1)))[0]
    assert record.tpot_s is None
    assert record.is_met(GOAL)


@pytest.mark.parametrize(
    ("script", "ending", "error"),
    [
        ([(0.01, Overloaded("no worker can", 2.0))], "rejected", "no worker can; retry after 2 s"),
        ([(0.1, Tokens(1)), (0.1, Overloaded("lost", 2.0))], "failed", "lost; retry after 2 s"),
        ([(0.1, Tokens(1)), (0.1, DeadlineExceeded("decode"))], "timed_out", "deadline exceeded during decode"),
        ([(0.1, Tokens(1)), (0.1, Unavailable("gone"))], "failed", "Unavailable: gone"),
        ([(0.1, Tokens(1)), (500.0, Tokens(1))], "timed_out", "no end after 100 s"),
        ([(0.1, Finished(4, 0, 0))], "failed", "an answer without tokens"),
    ],
)
def test_whatever_is_not_answered_is_a_miss(script: Script, ending: str, error: str) -> None:
    record = played(ScriptedTarget(lambda index: script))[0]
    assert (record.ending, record.error) == (ending, error)
    assert not record.has_ttft(Objectives())
    assert not record.has_tpot(Objectives())
    if ending == "rejected":
        assert record.end_s == pytest.approx(0.01)


def test_a_timed_out_request_is_closed() -> None:
    target = ScriptedTarget(lambda index: answer(500.0, 0.0, 1))
    played(target, at(0.0))
    assert target.cut == [0]


def test_a_hopeless_run_is_cut_off() -> None:
    """Two may miss; the third miss ends the run, with one request under way and one never sent."""
    target = ScriptedTarget(lambda index: answer(10.0 if index == 3 else 0.3, 0.0, 1))
    records = played(target, at(0.0, 0.1, 0.2, 0.25, 99.0), misses_allowed=2)
    assert [record.ending for record in records] == ["answered"] * 3 + ["given_up"] * 2
    assert target.cut == [3]
    assert [request.index for _, request, _ in target.sent] == [0, 1, 2, 3]


def test_times_are_read_from_the_clock_that_is_given() -> None:
    """One twice as fast as the loop's: sleeps end late by it, which is seen, and TTFT counts from the sending."""

    async def run() -> list[Record]:
        loop = asyncio.get_running_loop()
        target = ScriptedTarget(lambda index: answer(0.1, 0.0, 1))
        return await play(target, at(0.0, 1.0), objectives=GOAL, timeout_s=10.0, clock=lambda: 2 * loop.time())

    first, second = virtual_loop.run(run())
    assert first.late_s == pytest.approx(LEAD_S)
    assert second.late_s == pytest.approx(1.0 - LEAD_S)
    assert (first.ttft_s, second.ttft_s) == pytest.approx((0.2, 0.2))


def test_a_record_as_json_and_back() -> None:
    script = [(0.1, Tokens(1)), (0.0301234, Tokens(1)), (0.0, Finished(7, 2, 2, {"prefill_s": 0.05, "worker": "p"}))]
    record = played(ScriptedTarget(lambda index: script))[1]
    back = from_json(to_json(record, with_gaps=True))
    assert back.gaps_s == pytest.approx(record.gaps_s, abs=1e-6)
    assert back.ttft_s == pytest.approx(record.ttft_s, abs=1e-6)
    same = {"late_s": 0.0, "end_s": 0.0, "ttft_s": 0.0, "tpot_s": 0.0, "gaps_s": ()}
    assert replace(back, **same) == replace(record, **same)
    assert "gaps_ms" not in to_json(record, with_gaps=False)
