"""`tandem bench` as a whole: flags in, one JSON object and files out."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from cluster.commands.bench import bench
from cluster.loadtest.options import BenchOptions, make_load, make_plan, make_targets
from engine.errors import ConfigError
from tests.loadtest.fake_openai import completion, openai_server
from tests.loadtest.test_tandem_target import served as tandem_served

FAST = {"rate": 200.0, "requests": 12, "output_tokens": 3, "warm_up": 1, "pause_s": 0.0, "ttft_ms": 9e3, "tpot_ms": 2e3}


async def run(capsys: pytest.CaptureFixture[str], **flags: Any) -> dict[str, Any]:
    await bench(BenchOptions(**{**FAST, "as_json": True, **flags}))
    captured = capsys.readouterr()
    assert captured.err == ""
    [line] = captured.out.splitlines()
    return json.loads(line)


async def test_an_openai_url(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    async with openai_server(lambda body: (200, completion("a", "b", "c", gap_s=0.002))) as fake:
        values = await run(capsys, url=fake.url, out=tmp_path / "out", rate=None, rates="100,200", input_tokens=9)
        bodies = [body for _, body in fake.bodies]
    assert (values["attainment"], values["rejected"], values["requests"]) == (1.0, 0, 12)
    assert values["targets"] == {"openai": {"url": fake.url, "model": "tiny", "acts_on_objectives": False}}
    assert values["load"]["input_tokens"] == 9
    assert [point["rate_rps"] for point in values["points"]] == [100.0, 200.0]
    assert "gaps_ms" not in values["points"][0]["runs"][0]["records"][0]
    # One to warm up, and twelve for each rate; no two prompts alike.
    assert len({body["prompt"] for body in bodies}) == len(bodies) == 25
    assert {len(body["prompt"].split()) for body in bodies} == {9}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"results.json", "report.md", "attainment_rate.png"}
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(saved["points"][0]["runs"][0]["records"][0]["gaps_ms"]) == 2
    assert "![attainment_rate.png]" in (tmp_path / "out" / "report.md").read_text()


async def test_a_tandem_and_a_peer_take_turns_on_the_same_ids(capsys: pytest.CaptureFixture[str]) -> None:
    async with (
        openai_server(lambda body: (200, completion("a", "b", "c"))) as fake,
        tandem_served([1, 1, 1]) as (tandem, target),
    ):
        names = (f"ours=grpc://{target.url}", f"theirs={fake.url}")
        values = await run(capsys, target=names, prompt_form="ids", input_tokens=9, slo_scales="0.5,1,2", seeds=2)
        theirs = [body["prompt"] for _, body in fake.bodies[1:]]
        ours = [list(request.token_ids.ids) for request in tandem.requests[1:]]
    assert len(theirs) == 24
    assert theirs == ours[:24]
    # Ours acts on objectives: two more scales, two seeds each, with prompts of their own.
    assert len(ours) == len({tuple(ids) for ids in ours}) == 72
    assert {request.cache_salt for request in tandem.requests} == {tandem.requests[0].cache_salt}
    assert tandem.requests[0].cache_salt
    scales = [(point["target"], point["scale"], len(point["runs"])) for point in values["points"]]
    assert sorted(scales) == [(name, scale, 2) for name in ("ours", "theirs") for scale in (0.5, 1.0, 2.0)]


async def test_find_goodput(capsys: pytest.CaptureFixture[str]) -> None:
    """Each answer keeps the others waiting for 10 ms: above 100 a second they wait for longer than they may."""
    async with tandem_served([1]) as (tandem, target):
        tandem.alone_s = 0.01
        flags = {"url": target.url, "find_goodput": True, "rate": 50.0, "ttft_ms": 60.0, "output_tokens": 1}
        values = await run(capsys, **flags, requests=40, arrivals="fixed", tolerance=0.2)
    goodput = values["goodput"]["tandem"]
    assert values["rate_rps"] == goodput["rate_rps"]
    assert values["attainment"] >= 0.9
    # At 118 a second the last tenth have waited for 60 ms. A busy machine may find less.
    assert 0 < goodput["rate_rps"] <= 118
    assert len(goodput["probes"]) >= 3


async def test_other_objectives_on_a_saved_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    async with openai_server(lambda body: (200, completion("a", "b", gap_s=0.02))) as fake:
        await run(capsys, url=fake.url, out=tmp_path, output_tokens=2)
    path = tmp_path / "results.json"
    strict = await run(capsys, reslo=path, ttft_ms=10.0, tpot_ms=100.0, slo_scales="1,1000")
    assert [point["attainment"] for point in strict["points"]] == [0.0, 1.0]
    await bench(BenchOptions(reslo=path, ttft_ms=10.0, tpot_ms=100.0))
    assert "Goodput" in capsys.readouterr().out


async def test_a_report_and_a_line_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    async with openai_server(lambda body: (200, completion("a", "b", "c"))) as fake:
        await bench(BenchOptions(**FAST, url=fake.url))
    captured = capsys.readouterr()
    assert "openai 200 req/s seed 0: 100.0% met of 12" in captured.err
    assert "Latencies" in captured.out


async def test_an_interrupted_study_keeps_what_it_has(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    second = asyncio.Event()

    def behave(body: dict[str, Any]) -> tuple[int, list[Any]]:
        if len(fake.bodies) > 13:
            second.set()
            return 200, [9.0]
        return 200, completion("a", "b", "c")

    async with openai_server(behave) as fake:
        options = BenchOptions(**{**FAST, "rate": None}, rates="200,100", url=fake.url, out=tmp_path, as_json=True)
        task = asyncio.create_task(bench(options))
        await second.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    values = json.loads((tmp_path / "results.json").read_text())
    assert not values["is_whole"]
    assert [point["rate_rps"] for point in values["points"]] == [200.0]


async def test_a_files_prompts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n{"prompt": "once"}\n')
    async with openai_server(lambda body: (200, completion("a", "b", "c"))) as fake:
        values = await run(capsys, url=fake.url, prompts=path, requests=4)
        paths = [path for path, _ in fake.bodies]
    assert values["load"]["prompts"] == "prompts.jsonl"
    assert sorted(paths).count("/v1/chat/completions") in (2, 3)


async def test_files_are_read_before_anybody_is_called(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--prompts .*none: cannot be read"):
        await run(capsys, url="127.0.0.1:9", prompts=tmp_path / "none")
    with pytest.raises(ConfigError, match=r"none: cannot be read"):
        await run(capsys, url="127.0.0.1:9", trace=tmp_path / "none")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"ttft_ms": -1.0}, "--ttft-ms: got -1.0, expected a positive number"),
        ({"tpot_ms": float("nan")}, "--tpot-ms: got nan, expected a positive number"),
        ({"rate": 0.0}, "--rate: got 0.0"),
        ({"requests": 0}, "--requests: got 0, expected a number of 1 or more"),
        ({"seeds": 0}, "--seeds: got 0"),
        ({"attainment": 1.1}, "--attainment: got 1.1, expected a share in (0, 1]"),
        ({"rates": "1,x"}, "--rates: got '1,x', expected positive numbers, with commas between"),
        ({"slo_scales": "1,-2"}, "--slo-scales: got '1,-2'"),
        ({"rate": 1.0, "rates": "1"}, "--rates: goes with no --rate"),
        ({"rates": "1,2", "find_goodput": True, "ttft_ms": 1.0}, "--rates: goes with no --find-goodput"),
        ({"find_goodput": True}, "--find-goodput: needs --ttft-ms, --tpot-ms or both"),
        ({"url": "x", "target": ("a=b",)}, "--url: goes with no --target"),
        ({"trace": Path("t"), "input_tokens": 5}, "--input-tokens: goes with no --trace"),
        ({"prompts": Path("p"), "input_tokens": 5}, "--input-tokens: goes with no --prompts"),
        ({"arrivals": "uniform"}, "--arrivals: got 'uniform', expected poisson, gamma or fixed"),
        ({"cv": 2.0, "arrivals": "fixed"}, "--cv: goes with --arrivals gamma"),
    ],
)
def test_flags_that_cannot_be(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        BenchOptions(**flags).check()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"url": "nowhere"}, "--url: got 'nowhere', expected HOST:PORT, grpc://HOST:PORT or http://HOST:PORT/v1"),
        ({"target": ("a",)}, "--target: got 'a', expected NAME=URL"),
        ({"target": ("a=h:1", "a=h:2")}, "--target: got 'a' twice"),
        ({"url": "http://h/v1", "extra_body": "["}, "--extra-body: is not JSON"),
        ({"url": "http://h/v1", "extra_body": "[]"}, "--extra-body: got '[]', expected a JSON object"),
        ({"url": "http://h/v1", "header": ("secret",)}, "--header: expected NAME=VALUE"),
    ],
)
async def test_targets_that_cannot_be(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_targets(BenchOptions(**flags))
    assert message in str(caught.value)


def test_loads_and_rates(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [{"arrival_s": 2 * index, "prompt_tokens": 100, "output_tokens": 7} for index in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = BenchOptions(trace=path, requests=4, output_tokens=9)
    load = make_load(options)
    assert (load.count, load.process, load.rows[0].output_tokens) == (4, None, 9)
    assert make_plan(options, load).rates_rps == (0.5,)
    assert make_plan(BenchOptions(trace=path, rate=3.0, seeds=2, seed=7), load).seeds == (7, 8)
    bursty = make_load(BenchOptions(cv=3.0))
    assert bursty.process is not None
    assert (bursty.process.kind, bursty.process.cv) == ("gamma", 3.0)
    with pytest.raises(ConfigError, match="--rate: not given"):
        make_plan(BenchOptions(), bursty)
    with pytest.raises(ConfigError, match=r"the shortest request has 109 tokens .* the model's context of 50"):
        load.fitting(50)
    lengths = [json.dumps({**row, "arrival_s": None}) + "\n" for row in rows]
    path.write_text("".join(lengths))
    assert make_load(BenchOptions(trace=path)).process is not None
