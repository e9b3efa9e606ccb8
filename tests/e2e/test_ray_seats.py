"""ray_seats_cases.py in a process of its own: whether Ray asks for a token is settled once in a process, when it is
first imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray]
ROOT = Path(__file__).parents[2]


def test_workers_on_the_nodes_that_are_meant_for_them() -> None:
    cases = Path(__file__).with_name("ray_seats_cases.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(cases)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout
