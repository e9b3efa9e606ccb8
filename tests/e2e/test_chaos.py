"""`tandem chaos` as a user runs it: faults of every kind, and every answer is whole and right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from cluster.loadtest.prompts import WORDS
from cluster.security.api_keys import new_key
from cluster.security.certs import make_certs
from tests.e2e.service import tandem
from tests.golden.default_model import require_default_model
from tests.tiny_models import CONFIGS, save_model

CONFIG = """
engine: {kv_cache_bytes: 67108864, threads: 1}
gateway: {heartbeat_interval_s: 0.2, fresh_s: 1.5, expire_s: 5}
cluster: {lease_s: 4}
"""
PLAN = """
seconds: 22
streams: 4
prompts: 4
prompt_tokens: 60
answer_tokens: 24
faults:
  - {kind: kill, target: decode-0, at_s: 1}
  - {kind: kill, target: prefill-0, at_s: 2}
  - {kind: stop, target: decode-1, at_s: 8, for_s: 6}
  - {kind: partition, target: prefill-1, at_s: 15, for_s: 6}
"""
# Many small frames, all of which travel: nothing is kept in a prefix cache, or computed where it is decoded.
TINY_CONFIG = """
engine: {model: MODEL, kv_cache_bytes: 4194304, threads: 1, prefix_cache: false}
prefill: {max_frame_bytes: 4096}
gateway:
  heartbeat_interval_s: 0.2
  fresh_s: 1.5
  router: {policy: least_loaded}
  auth: {keys_file: CERTS/keys, operators: [ops]}
security: {gateway_certs: CERTS/gateway, worker_certs: CERTS/worker, client_certs: CERTS/clients}
"""
TINY_PLAN = """
seconds: 9
streams: 4
prompts: 4
prompt_tokens: 60
answer_tokens: 24
faults:
  - {kind: corrupt, target: prefill-0, at_s: 0, for_s: 9, every_frames: 50}
  - {kind: corrupt, target: prefill-1, at_s: 0, for_s: 9, every_frames: 25}
  - {kind: slow, target: decode-0, at_s: 1, for_s: 2, delay_ms: 20}
  - {kind: slow, target: prefill-0, peer: decode, at_s: 2, for_s: 2, bytes_per_s: 1.0e+6}
  - {kind: clock, target: decode-1, at_s: 4, jump_s: 60}
  - {kind: clock, target: prefill-1, at_s: 5, for_s: 2, rate: 10}
  - {kind: clock, target: decode-0, at_s: 6, for_s: 2, rate: 0.2}
"""


def run_chaos(folder: Path, config: str, plan: str, *flags: str) -> dict[str, Any]:
    """The report of a run in which all is as it should be."""
    (folder / "config.yaml").write_text(config)
    (folder / "plan.yaml").write_text(plan)
    files = ("--config", str(folder / "config.yaml"), "--plan", str(folder / "plan.yaml"))
    result = tandem("chaos", *files, *flags, "--json", timeout_s=500)
    assert result.returncode == 0, result.stdout + result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    assert report["clean"]
    assert report["requests"] == report["finished"] > 10
    assert report["wrong"] == 0
    return report


@pytest.mark.model
@pytest.mark.timeout(600)
def test_requests_outlive_workers_that_are_killed_frozen_and_cut_off(tmp_path: Path) -> None:
    require_default_model()
    report = run_chaos(tmp_path, CONFIG, PLAN)
    assert report["faults"] == {"kill": 2, "stop": 1, "partition": 1}
    assert report["retried"] >= 3
    assert {"stop", "partition"} <= set(report["held_s"]) <= {"kill", "stop", "partition"}


@pytest.mark.timeout(600)
def test_nobody_notices_damage_slow_links_and_wrong_clocks(tmp_path: Path) -> None:
    """With certificates everywhere, and keys: what passes the links cannot be read there."""
    make_certs(tmp_path / "certs", ["localhost", "127.0.0.1"], days=1)
    folder = save_model("llama", tmp_path / "model")
    words = ["<unk>", *WORDS][: CONFIGS["llama"].vocab_size]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = TINY_CONFIG.replace("MODEL", str(folder)).replace("CERTS", str(tmp_path / "certs"))
    key = tmp_path / "key"
    key.write_text(new_key("ops", tmp_path / "certs" / "keys"))
    report = run_chaos(tmp_path, config, TINY_PLAN, "--api-key-file", str(key))
    assert report["faults"] == {"corrupt": 2, "slow": 2, "clock": 3}
    assert 10 < report["flips"] - report["unread"] <= report["kv_faults"] <= report["flips"]
    assert report["longest_pause_s"] >= 0.04, "a link was slow both ways"


def test_a_plan_that_cannot_be_read(tmp_path: Path) -> None:
    result = tandem("chaos", "--plan", str(tmp_path / "none.yaml"))
    assert result.returncode == 2
    assert "cannot be read" in result.stderr
