"""bench/engine.py: what it computes from what it measures. A whole run is in test_bare_machine.py."""

from __future__ import annotations

import sys

import pytest
import torch

from bench.ceilings import Ceilings
from bench.engine import Ours, Rates, floor_seconds, measure, parse, report
from bench.engine_arm import random_prompts
from bench.engine_processes import ArmFailed, Point, ProcessArm, environment_of, process_arm
from bench.model_configs import TINY
from bench.model_work import ModelWork
from bench.tandem_engine import load

WORK = ModelWork(weight_bytes=1000, kv_token_bytes=10, token_flops=50, pair_flops=2)
CEILINGS = Ceilings(copy_bytes_per_s=1e5, read_bytes_per_s=2e5, matmul_flops=1e4)
PREFILL, DECODE = Point(10), Point(100, 4)
# Answers how long it would take at 2 ms a prompt token and 5 ms a step.
PEER = """
import json, sys
print(json.dumps({"ready": True, "decodes": sys.argv[1] == "decodes"}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if "batch" in asked:
        seconds = 0.005 * asked["steps"]
    else:
        seconds = 0.002 * asked["prompts"] * asked["prompt_tokens"] + 0.005 * (asked["new_tokens"] - 1)
    print(json.dumps({"seconds": seconds}), flush=True)
"""


class Scripted:
    """An arm whose rates are known; None: it fails."""

    def __init__(self, name: str, *rates: float | None) -> None:
        self.name = name
        self._rates = iter(rates)

    def measure(self, point: Point, steps: int) -> float:
        if (rate := next(self._rates)) is None:
            raise ArmFailed(f"{self.name} ended with status 1")
        return rate


@pytest.fixture
def peer(request: pytest.FixtureRequest):
    """PEER in a process, told `request.param`."""
    with process_arm("peer", [sys.executable, "-c", PEER, request.param], environment_of(is_ours=False)) as arm:
        yield arm


# ── what is computed ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_median_of_ratios_is_not_the_ratio_of_medians() -> None:
    rates = Rates()
    for ours, theirs in ((10.0, 1.0), (20.0, 10.0), (30.0, 30.0)):
        rates.add(DECODE, "Tandem", ours)
        rates.add(DECODE, "peer", theirs)
    assert rates.median(DECODE, "Tandem") == 20
    assert rates.ratio(DECODE, "Tandem", "peer") == 2
    assert rates.median(PREFILL, "Tandem") is None
    assert rates.ratio(DECODE, "Tandem", "another") is None


def test_floors() -> None:
    # 1,000 bytes of weights and 4 * 100 tokens of 10; without a context the middle of 32 + 0 … 8.
    assert floor_seconds(WORK, DECODE, 8, CEILINGS) == pytest.approx(5000 / 1e5)
    assert floor_seconds(WORK, Point(0, 2), 8, CEILINGS) == pytest.approx((1000 + 2 * 36 * 10) / 1e5)
    assert floor_seconds(WORK, PREFILL, 8, CEILINGS) == pytest.approx((10 * 50 + 55 * 2) / 1e4)


def test_a_report() -> None:
    rates, ours = Rates(), Ours(Scripted("Tandem"), WORK)
    rates.add(PREFILL, "Tandem", 50.0)
    rates.add(PREFILL, "peer", 25.0)
    rates.add(DECODE, "Tandem", 40.0)
    rates.failed["peer"] = "peer ended with status 1"
    lines = report([ours], ["peer"], [PREFILL, DECODE], 8, rates, CEILINGS).splitlines()
    assert lines[0] == "|  | Tandem, tok/s | peer, tok/s | Tandem / peer | ms | floor, ms | ms / floor |"
    assert lines[2] == "| prefill, 10 tokens | 50 | 25 | 2.00 | 200.00 | 61.00 | 3.28 |"
    assert lines[3] == "| decode, batch 4, context 100 | 40 | – | – | 100.00 | 50.00 | 2.00 |"
    assert lines[-1] == "peer did not finish: peer ended with status 1."


def test_two_of_ours_get_a_row_each() -> None:
    rates = Rates()
    for name, rate in (("Tandem int4", 80.0), ("Tandem int8", 40.0), ("peer", 20.0)):
        rates.add(DECODE, name, rate)
    ours = [Ours(Scripted(f"Tandem {label}"), WORK, label) for label in ("int4", "int8")]
    lines = report(ours, ["peer"], [DECODE], 8, rates, CEILINGS).splitlines()
    assert lines[2].startswith("| decode, batch 4, context 100, int4 | 80 | 20 | 4.00 | 50.00 |")
    assert lines[3].startswith("| decode, batch 4, context 100, int8 | 40 | 20 | 2.00 | 100.00 |")


def test_the_first_round_is_thrown_away_and_who_fails_is_left_out() -> None:
    rates, arguments = Rates(), parse(["--rounds", "2"])
    arms = [Scripted("Tandem", 1.0, 2.0, 4.0), Scripted("peer", 1.0, None)]
    measure(arms, [DECODE], arguments, rates, pause_s=0)
    assert rates.median(DECODE, "Tandem") == 3
    assert rates.median(DECODE, "peer") is None
    assert rates.failed == {"peer": "peer ended with status 1"}


# ── arms ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("peer", ["generates", "decodes"], indirect=True)
def test_rates_of_a_process(peer: ProcessArm) -> None:
    """Both ways to measure decoding see the steps alone."""
    assert peer.measure(Point(50), 8) == pytest.approx(500)
    assert peer.measure(Point(100, 4), 8) == pytest.approx(800)
    assert peer.measure(Point(0, 4), 8) == pytest.approx(800)


def test_a_process_that_ends_says_so() -> None:
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    with (
        pytest.raises(ArmFailed, match="peer ended with status 3"),
        process_arm("peer", command, environment_of(is_ours=False)),
    ):
        pass


def test_prompts_stay_inside_the_vocabulary() -> None:
    for vocab_size in (2, 512, 128_256):
        prompts = random_prompts(3, 50, 0, vocab_size)
        assert [len(prompt) for prompt in prompts] == [50] * 3
        assert 0 <= min(map(min, prompts)) <= max(map(max, prompts)) < vocab_size


@pytest.mark.parametrize("pin", [False, True])
def test_our_arm_decodes_with_as_many_blocks_as_it_was_promised(pin: bool) -> None:
    point = Point(40, 3)
    engine = load(
        "tiny",
        "",
        dtype="float32",
        weight_format="dense",
        kernels="torch",
        device=torch.device("cpu"),
        threads=torch.get_num_threads(),
        pin=pin,
        kv_tokens=point.room(4),
        max_batch=3,
        chunk=64,
    )
    assert engine.vocab_size == TINY.vocab_size
    assert engine.decode(3, 40, 4) > 0
    assert engine.decode(1, 1, 4) > 0
    engine.generate([[1, 2, 3], [4, 5, 6]], 3)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--vllm-python", "python"], "go together"),
        (["--gguf", "file"], "go together"),
        (["--prefill", "", "--batches", ""], "nothing to measure"),
        (["--random", "unknown"], "invalid choice"),
        (["--weights", "int4,int3"], "'int3'"),
    ],
)
def test_arguments_that_make_no_run(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(argv)
    assert message in capsys.readouterr().err
