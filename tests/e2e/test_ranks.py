"""Workers of two ranks each on a real local Ray: they answer, and a rank that dies is replaced."""

from __future__ import annotations

import pytest

from tests.e2e.service import CONFIG, Served, error_of, eventually, is_alive, kill, serving, tandem
from tests.golden.default_model import require_default_model

pytestmark = [pytest.mark.model, pytest.mark.ray]

QUESTION = ("The capital of France is", "--temperature", "0", "--max-tokens", "4")
TWO_RANKS = CONFIG.replace("engine: {", "engine: {tensor_parallel: 2, threads: 1, ")


def test_workers_of_two_ranks_answer(tmp_path):
    require_default_model()
    with serving(tmp_path, "--address", "ray", "--prefill", "0", config=TWO_RANKS) as served:
        assert served.generate(*QUESTION)[0]["text"].startswith(" Paris")
        processes = served.descendants()
        assert len(ranks_of(served)) == 1
        assert served.stop() == 0
        assert not [command for pid, command in processes.items() if is_alive(pid)]


@pytest.mark.nightly
def test_a_rank_that_dies_is_replaced_with_its_leader(tmp_path):
    require_default_model()
    with serving(tmp_path, "--address", "ray", config=TWO_RANKS) as served:
        before = {worker_id: worker["incarnation"] for worker_id, worker in served.workers().items()}
        kill(ranks_of(served))
        for worker_id, incarnation in before.items():
            eventually(lambda: served.workers().get(worker_id, {}).get("incarnation", 0) > incarnation, 60)  # noqa: B023
        assert served.generate(*QUESTION)[0]["text"].startswith(" Paris")


def test_more_ranks_than_heads(tmp_path):
    """Found out before any rank is started."""
    require_default_model()
    file = tmp_path / "tandem.yaml"
    file.write_text("engine: {tensor_parallel: 10}\ncluster: {grpc_port: 0}\n")
    error = error_of(tandem("serve", "--config", str(file), "--address", "none", "--prefill", "0"))
    assert error.startswith("worker decode-0: tensor_parallel: got 10, expected at most 9: ")


def ranks_of(served: Served) -> list[int]:
    """Process ids of all ranks that are not leaders."""
    return [pid for pid, command in served.descendants().items() if "RankActor" in command]
