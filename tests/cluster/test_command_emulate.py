"""`tandem emulate`: what it prints, and that what is wrong is named by its flag."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from cluster.commands.emulate import run
from cluster.planning.options import EmulateOptions
from engine.errors import ConfigError, TandemError

KEYS = {
    *("attainment", "attainment_ttft", "attainment_tpot", "goodput_rps_per_gpu", "rejected"),
    *("ttft_ms", "tpot_ms", "virtual_s", "wall_s", "events"),
}


@pytest.fixture
def options(tmp_path: Path) -> EmulateOptions:
    path = tmp_path / "trace.jsonl"
    rows = ({"arrival_s": 3 * (index // 2), "prompt_tokens": 200, "output_tokens": 4} for index in range(8))
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return EmulateOptions(trace=path, profile="l4", model="llama-3.1-8b", prefill=1, decode=1, ttft_ms=500, tpot_ms=100)


def printed(options: EmulateOptions, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    run(dataclasses.replace(options, as_json=True))
    values = json.loads(capsys.readouterr().out)
    assert isinstance(values, dict)
    return values


def test_json_has_what_was_agreed(options: EmulateOptions, capsys: pytest.CaptureFixture[str]) -> None:
    values = printed(options, capsys)
    assert values.keys() >= KEYS
    assert values["ttft_ms"].keys() == values["tpot_ms"].keys() == {"p50", "p90", "p99"}  # type: ignore[attr-defined]
    assert values["attainment"] == 1.0
    assert values["rejected"] == 0
    assert 9.0 < values["virtual_s"] < 10.0  # type: ignore[operator]


def test_a_table_is_printed_without_json(options: EmulateOptions, capsys: pytest.CaptureFixture[str]) -> None:
    run(dataclasses.replace(options, prefill=0, decode=0, colocated=2, as_json=False))
    shown = capsys.readouterr().out
    assert "8 requests, 2 GPUs" in shown
    assert "100.0%" in shown


def test_goodput_is_searched_for(options: EmulateOptions, capsys: pytest.CaptureFixture[str]) -> None:
    run(dataclasses.replace(options, find_goodput=True, ttft_ms=72, arrivals="poisson", rate=2.0, as_json=False))
    shown = capsys.readouterr().out
    assert "goodput per GPU" in shown
    assert "Rates tried" in shown


def test_rate_and_spread_change_the_arrivals(options: EmulateOptions, capsys: pytest.CaptureFixture[str]) -> None:
    rate = printed(options, capsys)["rate_rps"]
    assert rate == pytest.approx(7 / 9)
    assert printed(dataclasses.replace(options, rate_scale=2.0), capsys)["rate_rps"] == pytest.approx(14 / 9)
    assert printed(dataclasses.replace(options, spread=True), capsys)["rate_rps"] == pytest.approx(7 / 10.5)
    drawn = dataclasses.replace(options, arrivals="fixed", rate=4.0)
    assert printed(drawn, capsys)["rate_rps"] == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"decode": 0}, "--decode: got 0"),
        ({"prefill": 0}, "--prefill: got 0"),
        ({"colocated": -1}, "--colocated: got -1"),
        ({"ttft_ms": 0.0}, "--ttft-ms: got 0.0"),
        ({"rate_scale": -1.0}, "--rate-scale: got -1.0"),
        ({"limit": 0}, "--limit: got 0"),
        ({"arrivals": "uniform", "rate": 1.0}, "--arrivals: got 'uniform'"),
        ({"arrivals": "poisson"}, "--arrivals and --rate go together"),
        ({"profile": "h300"}, "h300"),
        ({"model": "gpt-9"}, "gpt-9"),
        ({"router": "astrology"}, "--router: got 'astrology', expected one of goodput"),
        ({"tp_decode": 7}, "tp"),
        ({"trace": Path("absent.jsonl")}, "absent.jsonl: cannot be read"),
    ],
)
def test_what_is_wrong_is_named(options: EmulateOptions, changes: dict[str, object], problem: str) -> None:
    with pytest.raises(TandemError) as caught:
        run(dataclasses.replace(options, as_json=True, **changes))  # type: ignore[arg-type]
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_trace_of_lengths_wants_arrivals(options: EmulateOptions) -> None:
    rows = ({"arrival_s": None, "prompt_tokens": 20, "output_tokens": 2} for _ in range(3))
    options.trace.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"has lengths only, expected --arrivals and --rate"):
        run(dataclasses.replace(options, as_json=True))
