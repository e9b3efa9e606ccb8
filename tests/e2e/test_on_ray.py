"""The ray_*_cases.py beside this file, each in a process of its own: whether Ray asks for a token is settled once in a
process, when it first speaks to a cluster, and what another test had settled would be refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray]
ROOT = Path(__file__).parents[2]
CASES = [
    pytest.param("ray_seats_cases.py", 8, id="workers on the nodes that are meant for them"),
    pytest.param("ray_service_cases.py", 2, id="the application of a RayService"),
    pytest.param("ray_fleet_cases.py", 2, id="actors come and leave", marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("cases", "count"), CASES)
def test_in_a_process_of_its_own(cases: str, count: int) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(Path(__file__).with_name(cases))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{count} passed" in done.stdout


def test_every_file_of_cases_is_run() -> None:
    assert {case.values[0] for case in CASES} == {path.name for path in Path(__file__).parent.glob("*_cases.py")}
