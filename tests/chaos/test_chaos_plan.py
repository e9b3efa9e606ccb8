"""A chaos plan from YAML: what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.chaos.plan import ChaosPlan, Fault, read_plan
from engine.errors import ConfigError


def test_without_a_file_a_worker_dies_every_five_seconds() -> None:
    assert read_plan(None) == ChaosPlan(faults=(Fault(kind="kill", every_s=5.0),))


def test_a_plan_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("seconds: 30\nstreams: 2\nfaults: [{kind: stop, target: decode, at_s: 3, for_s: 20}]\n")
    plan = read_plan(file)
    assert (plan.seconds, plan.streams) == (30, 2)
    assert plan.faults == (Fault(kind="stop", target="decode", at_s=3, for_s=20),)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("faults: [{kind: explode, at_s: 1}]", "faults.0.kind: got 'explode', expected: 'kill' or 'stop'"),
        ("faults: [{kind: kill}]", "faults.0: expected: either at_s or every_s"),
        ("faults: [{kind: kill, at_s: 1, every_s: 2}]", "faults.0: expected: either at_s or every_s"),
        ("second: 3", "second: unknown key, nearest known key: seconds"),
        ("faults: [{kind: kill, att_s: 1}]", "faults.0.att_s: unknown key, nearest known key: at_s"),
        ("seconds: -1", "seconds: got -1, expected: greater than 0"),
        ("[]", "got a list, expected a mapping with the keys seconds, streams"),
        ("{", "is not YAML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=problem) as raised:
        read_plan(file)
    assert str(file) in str(raised.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_plan(tmp_path / "none.yaml")
