"""`tandem chaos` as a user runs it: workers are killed and frozen, and every answer is whole and right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.service import tandem
from tests.golden.default_model import require_default_model

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]
CONFIG = """
engine: {kv_cache_bytes: 67108864, threads: 1}
gateway: {heartbeat_interval_s: 0.2, fresh_s: 1.5, expire_s: 5}
cluster: {lease_s: 4}
"""
PLAN = """
seconds: 25
streams: 4
prompts: 4
prompt_tokens: 60
answer_tokens: 24
faults:
  - {kind: kill, target: decode-0, at_s: 2}
  - {kind: kill, target: prefill-0, at_s: 4}
  - {kind: stop, target: decode-1, at_s: 10, for_s: 12}
"""


def test_requests_outlive_killed_and_frozen_workers(tmp_path: Path) -> None:
    require_default_model()
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "plan.yaml").write_text(PLAN)
    files = ("--config", str(tmp_path / "config.yaml"), "--plan", str(tmp_path / "plan.yaml"))
    result = tandem("chaos", *files, "--json", timeout_s=500)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert report["faults"] == {"kill": 2, "stop": 1}
    assert report["requests"] == report["finished"] > 10
    assert report["retried"] >= 2
    assert report["clean"]


def test_a_plan_that_cannot_be_read(tmp_path: Path) -> None:
    result = tandem("chaos", "--plan", str(tmp_path / "none.yaml"))
    assert result.returncode == 2
    assert "cannot be read" in result.stderr
