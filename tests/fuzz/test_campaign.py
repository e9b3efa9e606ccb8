"""The long search, in short. Only where `make fuzz` has been: nothing else installs atheris."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import campaign

ROOT = Path(__file__).parents[2]


def test_a_target_is_searched_and_measured() -> None:
    pytest.importorskip("atheris")
    result = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.campaign", "--inputs", "2000", "version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2,000" in result.stdout


def test_one_that_fails_is_said_to_have_failed(tmp_path: Path) -> None:
    # A child that does not know its target ends without having measured anything.
    assert campaign.campaign("nothing", 10, tmp_path) == {}
    table = campaign.report(["nothing"], [{}])
    assert list(table.columns[1].cells) == ["failed"]
