"""The files of deploy/ray, as far as can be told without the machines: Ray's own checks, and what they name."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.config import load

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "deploy" / "ray").glob("*.yaml"))
CLUSTERS = [file for file in FILES if file.name != "tandem.yaml"]


@pytest.fixture(params=CLUSTERS, ids=lambda file: file.name)
def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    return yaml.safe_load(request.param.read_text())


def test_there_are_three():
    assert [file.name for file in CLUSTERS] == ["aws.yaml", "cluster.yaml", "gcp.yaml"]


def test_ray_takes_them(cluster: dict[str, Any]):
    """The launcher's first steps: its defaults are filled in, and the whole is checked against its schema."""
    prepared = prepare_config(cluster)
    validate_config(prepared)
    with pytest.raises(Exception, match="wrong_key"):
        validate_config({**prepared, "wrong_key": 1})


def test_commands_are_shell(cluster: dict[str, Any]):
    for name in cluster:
        if name.endswith("_commands"):
            for command in cluster[name]:
                subprocess.run(["bash", "-n", "-c", command], check=True)


def test_everything_that_is_installed_is_pinned(cluster: dict[str, Any]):
    for command in (command for name in cluster if name.endswith("setup_commands") for command in cluster[name]):
        words = command.partition("pip install ")[2].replace("-c ~/tandem/constraints.txt", "").split()
        assert [word for word in words if "==" not in word] == ["--quiet"] * bool(words), command


def test_every_node_has_the_token_and_the_checkout(cluster: dict[str, Any]):
    assert cluster["file_mounts"] == {"~/tandem": "~/tandem", "~/.ray/auth_token": "~/.ray/auth_token"}
    assert "RAY_AUTH_MODE=token" in (ROOT / "deploy" / "ray" / "node.sh").read_text()


def test_clouds_have_nodes_for_each_pool(cluster: dict[str, Any]):
    """And the service of tandem.yaml fits on the nodes that there are from the start."""
    service = load(ROOT / "deploy" / "ray" / "tandem.yaml").cluster
    types = cluster.get("available_node_types", {})
    assert bool(types) == (cluster["provider"]["type"] != "local")
    for count, labels in ((service.prefill, service.prefill_nodes), (service.decode, service.decode_nodes)):
        having = [kind for kind in types.values() if labels.items() <= kind.get("labels", {}).items()]
        assert not types or sum(kind["min_workers"] * kind["resources"]["GPU"] for kind in having) >= count
    assert service.address == "auto"


def test_a_job_has_time_to_drain():
    """Ray kills it after so many seconds."""
    wait_s = re.search(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", (ROOT / "deploy" / "ray" / "node.sh").read_text())
    assert wait_s
    # Both of the gateway and of the workers, whose processes end within 15 s more.
    assert int(wait_s[1]) > 2 * load(ROOT / "deploy" / "ray" / "tandem.yaml").cluster.drain_s + 15


@pytest.mark.parametrize("script", ["install.sh", "node.sh"])
def test_scripts_are_shell(script: str):
    subprocess.run(["bash", "-n", str(ROOT / "deploy" / "ray" / script)], check=True)


def test_torch_is_pinned_in_one_place():
    """install.sh reads it out of the Makefile."""
    text = (ROOT / "deploy" / "ray" / "install.sh").read_text()
    (read,) = re.findall(r"\$\((sed [^)]*)\)", text)
    pin = subprocess.run(["bash", "-c", read], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert re.fullmatch(r"torch==[\d.]+", pin)
