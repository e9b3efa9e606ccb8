"""The service on a real local Ray."""

from __future__ import annotations

import pytest

from tests.e2e.service import error_of, eventually, is_alive, kill, serving, tandem
from tests.golden.default_model import require_default_model

pytestmark = [pytest.mark.model, pytest.mark.ray]


def test_serve_lose_a_worker_and_shut_down(tmp_path):
    require_default_model()
    with serving(tmp_path, "--address", "ray") as served:
        question = ("The capital of France is", "--temperature", "0", "--max-tokens", "6")
        assert served.generate(*question)[0]["text"].startswith(" Paris")
        before = served.workers()["decode-0"]["incarnation"]
        actors = [pid for pid, command in served.descendants().items() if "WorkerActor" in command]
        assert len(actors) == 2
        kill(actors)
        eventually(lambda: served.workers().get("decode-0", {}).get("incarnation", 0) > before, 60)
        eventually(lambda: len(served.workers()) == 2, 60)
        assert served.generate(*question)[0]["text"].startswith(" Paris")
        processes = served.descendants()
        assert served.stop() == 0
        assert not [command for pid, command in processes.items() if is_alive(pid)]
    log = served.log.read_text()
    assert "worker decode-0 died; starting it again" in log
    assert "raylet" not in log
    assert "Traceback" not in log


def test_more_gpus_than_there_are(tmp_path):
    require_default_model()
    file = tmp_path / "tandem.yaml"
    file.write_text("cluster: {gpus_per_worker: 64}\n")
    error = error_of(tandem("serve", "--config", str(file), "--grpc-port", "0"))
    assert error.startswith("cluster: got 2 workers of {'CPU': 1, 'GPU': 64.0} each (PACK), expected no more than")
