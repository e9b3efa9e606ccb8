"""A session of real runs: kept and read back, and laid beside an emulation of all its runs."""

from __future__ import annotations

import json

import pytest

from bench.reality_session import Run, Session, as_sent
from cluster.loadtest.record import Record
from cluster.planning.emulation_result import Ending, RequestRecord


def record(index: int, arrival_s: float, late_s: float = 0.0) -> Record:
    return Record(index, arrival_s, late_s, "answered", 1.0, 0.5, 0.02, prompt_tokens=10 + index, asked_tokens=4)


SESSION = Session(
    (record(0, 0.0),),
    (
        Run(0.7, 1000, 0.0, (record(0, 0.0), record(1, 2.0, late_s=0.25))),
        Run(1.2, 1000, 30.0, (record(0, 0.5),)),
    ),
)


def test_all_runs_are_one_trace_on_one_clock() -> None:
    trace = as_sent(SESSION.runs)
    assert trace.arrivals_s == (0.0, 2.25, 30.5)
    assert [request.prompt_tokens for request in trace.requests] == [10, 11, 10]
    assert {request.output_tokens for request in trace.requests} == {4}


def test_an_emulation_of_all_is_cut_into_its_runs() -> None:
    records = [RequestRecord(index, 0.0, 1.0, 10, 4, Ending.DONE) for index in range(3)]
    assert SESSION.cut(records) == [records[:2], records[2:]]
    with pytest.raises(ValueError, match="got 2, but the runs had 3"):
        SESSION.cut(records[:2])


def test_a_session_survives_its_file() -> None:
    assert Session.from_json(json.loads(json.dumps(SESSION.to_json()))) == SESSION
