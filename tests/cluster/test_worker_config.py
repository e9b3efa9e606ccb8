"""What one worker runs by: its role's parallel degrees, and what the gateway makes of the same configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import load
from cluster.gateway_cost import device_name, role_cost
from cluster.worker_config import ranks_of, worker_config
from cluster.worker_spec import WorkerNames, is_colocated, worker_names
from engine.errors import ConfigError
from engine.model_source import ModelFiles
from tests.tiny_models import save_model

PLAN = """
engine: {model: llama-3.1-8b, tensor_parallel: 4}
cluster: {prefill: 2, decode: 1, prefill_parallel: [2, 1], decode_parallel: [1, 2]}
"""


@pytest.fixture
def loaded(tmp_path: Path):
    def load_text(text: str):
        path = tmp_path / "tandem.yaml"
        path.write_text(text)
        return load(path)

    return load_text


def test_each_role_has_its_own_degrees(loaded):
    config = loaded(PLAN)
    assert worker_config(config, "prefill").engine.parallel == (2, 1)
    assert worker_config(config, "decode").engine.parallel == (1, 2)
    assert ranks_of(config, "prefill") == ranks_of(config, "decode") == 2
    again = worker_config(worker_config(config, "prefill"), "prefill")
    assert again.engine.parallel == (2, 1)
    assert worker_config(config, "decode").cluster == config.cluster, "nothing but the engine is the worker's own"


def test_without_them_the_engines_hold(loaded):
    config = loaded("engine: {tensor_parallel: 4, pipeline_parallel: 2}\n")
    for role in ("prefill", "decode"):
        assert worker_config(config, role).engine.parallel == (4, 2)
        assert ranks_of(config, role) == 8


def test_colocated_workers(loaded):
    config = loaded("cluster: {prefill: 0, decode: 0, colocated: 2}\n").cluster
    assert worker_names(config) == [("decode", "colocated-0"), ("decode", "colocated-1")]
    assert is_colocated("colocated-0")
    assert not is_colocated("decode-0")
    names = WorkerNames(config)
    assert [names.next("decode"), names.next("decode"), names.next("prefill")] == ["decode-0", "decode-1", "prefill-0"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cluster: {decode: 0}\n", "cluster.decode: got 0, expected: at least 1 where colocated is 0"),
        (
            "cluster: {decode: 0, colocated: 1}\n",
            "cluster.decode: got 0, expected: at least 1 where there are prefill workers: colocated ones",
        ),
        ("cluster: {prefill_parallel: [2]}\n", "cluster.prefill_parallel"),
        ("cluster: {decode_parallel: [0, 1]}\n", "cluster.decode_parallel"),
        ("cluster: {controller: {min_gain: 0}}\n", "cluster.controller.min_gain: got 0, expected: greater than 0"),
        ("cluster: {controller: {enable: true}}\n", "unknown key, nearest known key: cluster.controller.enabled"),
        (
            "cluster: {prefill_parallel: [2, 1], controller: {enabled: true}}\n",
            "controller.enabled: got true, expected false where prefill_parallel and decode_parallel differ",
        ),
        ("cluster: {controller: {enabled: true, min_prefill: 2}}\n", "controller.min_prefill: got 2, expected at most"),
        ("cluster: {controller: {enabled: true, max_workers: 1}}\n", "controller.max_workers: got 1, expected at le"),
        ("cluster: {controller: {enabled: true, min_workers: 3}}\n", "controller.min_workers: got 3, expected at mo"),
        ("cluster: {controller: {grow_above: 0.5}}\n", "shrink_below: got 0.6, expected less than grow_above"),
        ("cluster: {controller: {min_workers: 3, max_workers: 2}}\n", "min_workers: got 3, expected at most max_w"),
    ],
)
def test_mistakes_name_the_field(loaded, text: str, expected: str):
    with pytest.raises(ConfigError) as error:
        loaded(text)
    assert expected in str(error.value)


def test_the_gateway_asks_no_worker_for_the_cost(loaded, tmp_path: Path):
    files = ModelFiles("hf", save_model("llama", tmp_path))
    config = loaded("engine: {device: cpu, kv_cache_bytes: 1048576}\n")
    cost = role_cost(config, files, "decode")
    assert cost.kv_bytes(1) == 2 * 2 * 2 * 10 * 4, "layers, K and V, heads, size, float32"
    assert cost.kv_capacity_tokens == 1048576 // cost.kv_bytes(1)
    assert 0 < cost.decode_s(1, 10) < cost.prefill_s(1000)
    with pytest.raises(ConfigError, match="no-such-device"):
        role_cost(loaded("engine: {device: cpu}\ncluster: {profile: no-such-device}\n"), files, "prefill")


def test_the_device_is_what_the_driver_says(loaded, tmp_path: Path):
    driver = tmp_path / "gpus"
    auto, remote = loaded(""), loaded("cluster: {address: 'head:6379'}\n")
    assert device_name(auto, driver) == "cpu"
    assert device_name(remote, driver) == "cuda", "the GPUs may be elsewhere"
    (driver / "0000:01:00.0").mkdir(parents=True)
    (driver / "0000:01:00.0" / "information").write_text("Model: \t\t NVIDIA H200\nIRQ: 3\n")
    assert device_name(auto, driver) == "NVIDIA H200"
    assert device_name(loaded("engine: {device: cpu}\n"), driver) == "cpu"
