"""`tandem plan`: its flags, its files, its links."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.commands.plan import DISTSERVE_LINKS, links_of, run
from cluster.config import load
from cluster.planning.options import PlanOptions
from engine.errors import ConfigError


def a_trace(path: Path, count: int = 30) -> Path:
    lines = (
        json.dumps({"arrival_s": index * 0.1, "prompt_tokens": 200 + 10 * index, "output_tokens": 12})
        for index in range(count)
    )
    path.write_text("\n".join(lines) + "\n")
    return path


def options(tmp_path: Path, **changes: object) -> PlanOptions:
    values: dict[str, object] = {
        "profile": "cpu",
        "model": "smollm2-135m",
        "gpus": 2,
        "gpus_per_node": 8,
        "trace": a_trace(tmp_path / "trace.jsonl"),
        "ttft_ms": 1500.0,
        "tpot_ms": 90.0,
        "requests": 30,
        "keep": 1,
        "processes": 1,
    }
    return PlanOptions(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": 0}, "--gpus: got 0"),
        ({"gpus": 12}, "--gpus: got 12, expected whole nodes of --gpus-per-node, which is 8"),
        ({"gpus_per_node": 0}, "--gpus-per-node: got 0"),
        ({"ttft_ms": 0.0}, "--ttft-ms: got 0.0"),
        ({"tpot_ms": float("nan")}, "--tpot-ms: got nan"),
        ({"affinity": "medium"}, "--affinity: got 'medium', expected high or low"),
        ({"out": Path("plan.txt")}, "--out: got 'plan.txt', expected a name that ends in .yaml"),
        ({"keep": 0}, "--keep: got 0"),
        ({"limit": -1}, "--limit: got -1"),
        ({"router": "best"}, "--router: got 'best', expected one of goodput"),
        ({"trace": Path("nowhere.jsonl")}, "nowhere.jsonl: cannot be read"),
        ({"profile": "h2000"}, "profile 'h2000'"),
    ],
)
def test_errors_name_the_flag(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        run(options(tmp_path, as_json=True, **changes))
    assert message in str(error.value)


def test_links_come_from_the_profile(tmp_path: Path) -> None:
    fits = tmp_path / "fits.json"
    fits.write_text('{"facebook/opt-13b": {}}')
    assert links_of(str(fits)) == DISTSERVE_LINKS
    known = links_of("h200")
    assert known.nvlink_bytes_s > known.network_bytes_s > 0


@pytest.mark.nightly
def test_writes_what_serve_takes_and_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plans" / "plan.yaml"
    run(options(tmp_path, out=out, as_json=True))
    printed = json.loads(capsys.readouterr().out)
    assert printed["files"] == [str(out.with_suffix(suffix)) for suffix in (".yaml", ".md", ".json", ".png")]
    assert printed["chosen"]["gpus"] <= 2
    assert {arm["kind"] for arm in printed["arms"]} == {"disaggregated", "colocated"}
    config = load(out)
    workers = config.cluster.prefill + config.cluster.decode + config.cluster.colocated
    assert workers * 1 <= 2
    assert out.with_suffix(".md").read_text().startswith(f"**{printed['answer']}**")
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert json.loads(out.with_suffix(".json").read_text())["answer"] == printed["answer"]


@pytest.mark.nightly
def test_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(options(tmp_path, requests=20))
    printed = capsys.readouterr().out
    assert "arrangement" in printed
    assert "isaggregat" in printed


@pytest.mark.parametrize("gpus", [1, 2])
def test_a_trace_of_one_token_answers_can_be_planned(
    tmp_path: Path, gpus: int, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (json.dumps({"arrival_s": n * 0.2, "prompt_tokens": 100, "output_tokens": 1}) for n in range(20))
    trace = tmp_path / "short.jsonl"
    trace.write_text("\n".join(lines) + "\n")
    run(options(tmp_path, trace=trace, gpus=gpus, requests=20, as_json=True))
    assert json.loads(capsys.readouterr().out)["chosen"]["goodput_rps"] > 0
