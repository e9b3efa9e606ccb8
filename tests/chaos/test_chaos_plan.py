"""A chaos plan from YAML: what is wrong is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster.chaos.plan import KINDS, ChaosPlan, Clock, Corrupt, Kill, Partition, Slow, Stop, read_plan
from cluster.config import load
from engine.errors import ConfigError

ROOT = Path(__file__).parents[2]

WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")


def test_without_a_file_a_worker_dies_every_five_seconds() -> None:
    assert read_plan(None, WORKERS) == ChaosPlan(faults=(Kill(every_s=5.0),))


def test_a_plan_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("""
seconds: 30
streams: 2
faults:
  - {kind: stop, target: decode, at_s: 3, for_s: 20}
  - {kind: partition, target: decode-1, peer: prefill, every_s: 7}
  - {kind: slow, at_s: 1, delay_ms: 50, bytes_per_s: 1.0e+6}
  - {kind: corrupt, at_s: 0}
  - {kind: clock, at_s: 9, jump_s: 30, rate: 2}
""")
    plan = read_plan(file, WORKERS)
    assert (plan.seconds, plan.streams) == (30, 2)
    assert plan.faults == (
        Stop(target="decode", at_s=3, for_s=20),
        Partition(target="decode-1", peer="prefill", every_s=7),
        Slow(at_s=1, delay_ms=50, bytes_per_s=1e6),
        Corrupt(at_s=0, every_frames=1000),
        Clock(at_s=9, jump_s=30, rate=2),
    )
    assert plan.has(Clock)
    assert not plan.has(Kill)


def test_plans_that_are_shown_can_be_run(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "failures.md").read_text()
    shown = [block for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "faults:" in block]
    for text in (*shown, (ROOT / "bench" / "chaos_plan.yaml").read_text()):
        file = tmp_path / "plan.yaml"
        file.write_text(text)
        plan = read_plan(file, WORKERS)
        assert plan.has(Kill)
        assert {fault.kind for fault in plan.faults} == set(KINDS)
    assert len(shown) == 1
    load(ROOT / "bench" / "chaos_cluster.yaml")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("faults: [{kind: explode, at_s: 1}]", "faults.0.kind: got 'explode', expected one of kill, stop, partition"),
        ("faults: [{at_s: 1}]", "faults.0.kind: expected one of kill, stop, partition, slow, corrupt, clock"),
        ("faults: [3]", "faults.0: got 3, expected: a mapping"),
        ("faults: 3", "faults: got 3, expected: a list"),
        ("faults: [{kind: kill}]", "faults.0: expected: either at_s or every_s"),
        ("faults: [{kind: kill, at_s: 1, every_s: 2}]", "faults.0: expected: either at_s or every_s"),
        ("second: 3", "second: unknown key, nearest known key: seconds"),
        ("faults: [{kind: kill, att_s: 1}]", "faults.0.att_s: unknown key, nearest known key: at_s"),
        (
            "faults: [{kind: kill, at_s: 1, for_s: 9}]",
            "faults.0.for_s: unknown key, known: at_s, every_s, kind, target",
        ),
        ("faults: [{kind: stop, at_s: 1, peer: any}]", "faults.0.peer: unknown key, known: at_s, every_s, for_s, kind"),
        ("faults: [{kind: slow, at_s: 1}]", "faults.0: expected: delay_ms, bytes_per_s or both"),
        ("faults: [{kind: slow, at_s: 1, delay_ms: -3}]", "faults.0.delay_ms: got -3, expected: greater than or equal"),
        ("faults: [{kind: clock, at_s: 1}]", "faults.0: expected: jump_s, rate or both"),
        ("faults: [{kind: clock, at_s: 1, rate: 0}]", "faults.0.rate: got 0, expected: greater than 0"),
        ("faults: [{kind: clock, at_s: 1, jump_s: -1}]", "faults.0.jump_s: got -1, expected: greater than or equal"),
        ("faults: [{kind: corrupt, at_s: 1, every_frames: 0}]", "faults.0.every_frames: got 0, expected: greater than"),
        ("faults: [{kind: stop, at_s: 60}]", "faults.0.at_s: got 60, expected less than seconds, which is 60"),
        ("faults: [{kind: stop, every_s: 70}]", "faults.0.every_s: got 70, expected less than seconds, which is 60"),
        (
            "faults: [{kind: stop, at_s: 1}, {kind: stop, at_s: 1, target: decode-9}]",
            "faults.1.target: got 'decode-9', expected one of any, prefill, decode, prefill-0, prefill-1, decode-0",
        ),
        (
            "faults: [{kind: corrupt, at_s: 1, target: decode}]",
            "faults.0.target: got 'decode', expected one of any, prefill-0, prefill-1$",
        ),
        (
            "faults: [{kind: partition, at_s: 1, target: decode-1, peer: decode-0}]",
            "faults.0.peer: got 'decode-0', expected one of any, gateway, prefill, prefill-0, prefill-1$",
        ),
        ("seconds: -1", "seconds: got -1, expected: greater than 0"),
        ("[]", "got a list, expected a mapping with the keys seconds, streams"),
        ("{", "is not YAML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=problem) as raised:
        read_plan(file, WORKERS)
    assert str(file) in str(raised.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_plan(tmp_path / "none.yaml", WORKERS)
