"""The configuration: composition, overrides, and what it says about mistakes."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

from cluster.chaos.plan import read_plan
from cluster.config import FLAGS, TandemConfig, from_json, known_keys, load, to_json
from cluster.environment import prepare_ray, read_environment, usable_cores, worker_variables
from cluster.worker_spec import cpus_of, worker_names
from engine.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "tandem.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def problem(path: Path | None, **flags: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, {f"--{name.replace('_', '-')}": value for name, value in flags.items()})
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(f"{path}", "FILE")


def test_nothing_given_is_the_default():
    assert load() == TandemConfig()


def test_flags_override_the_file(file):
    path = file("cluster:\n  prefill: 3\n  decode: 4\n")
    config = load(path, {"--prefill": 2, "--decode": None})
    assert (config.cluster.prefill, config.cluster.decode) == (2, 4)


@pytest.mark.parametrize("text", ["", "# nothing\n", "engine:\n", "engine: {}\n"])
def test_empty_files_and_sections(file, text):
    if text == "engine:\n":
        assert "engine: got None, expected: a mapping" in problem(file(text))
    else:
        assert load(file(text)) == TandemConfig()


def test_a_flag_fills_an_empty_section(file):
    assert load(file("engine:\n"), {"--model": "m"}).engine.model == "m"


def test_it_is_frozen_and_travels_as_json():
    config = load(None, {"--model": "x.gguf", "--grpc-port": 0})
    with pytest.raises(ValueError, match="frozen"):
        config.engine.model = "y"
    assert from_json(to_json(config)) == config


def test_json_can_be_loaded_as_a_file(file):
    config = load(None, {"--prefill": 5})
    assert load(file(to_json(config))) == config


def test_every_flag_has_a_key():
    assert set(FLAGS.values()) <= set(known_keys())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prefil:\n  x: 1\n", "FILE:1: prefil: unknown key, nearest known key: prefill"),
        (
            "engine:\n  model: m\nprefill:\n  token_budgt: 1\n",
            "FILE:4: prefill.token_budgt: unknown key, nearest known key: prefill.token_budget",
        ),
        # The right key in the wrong section.
        ("engine:\n  max_batch: 1\n", "FILE:2: engine.max_batch: unknown key, nearest known key: decode.max_batch"),
        (
            "gateway:\n  router:\n    allow_locl: 1\n",
            "FILE:3: gateway.router.allow_locl: unknown key, nearest known key: gateway.router.allow_local",
        ),
        ("zzz: 1\n", "FILE:1: zzz: unknown key, known here: engine, prefill, decode, gateway, cluster"),
        ("decode:\n  max_batch: 0\n", "FILE:2: decode.max_batch: got 0, expected: greater than or equal to 1"),
        ("engine: {block_size: 12}\n", "FILE:1: engine.block_size: got 12, expected: must be a power of two"),
        ("engine: 7\n", "FILE:1: engine: got 7, expected: a mapping"),
        (
            "decode: {max_batch: 0}\nx: 1\n",
            "FILE:1: decode.max_batch: got 0, expected: greater than or equal to 1 (and",
        ),
        ("gateway: {fresh_s: .nan}\n", "FILE:1: gateway.fresh_s: got nan, expected: a finite number"),
        ("gateway: {fresh_s: 0.5}\n", "FILE:1: gateway: expected: heartbeat_interval_s must be less than fresh_s"),
        (
            "gateway:\n  auth: {key_file: x}\n",
            "FILE:2: gateway.auth.key_file: unknown key, nearest known key: gateway.auth.keys_file",
        ),
        (
            "gateway: {tenants: {acme: {requests_pers: 1}}}\n",
            "FILE:1: gateway.tenants.acme.requests_pers: unknown key, nearest known key: gateway.quota.requests_per_s",
        ),
        ("gateway: {quota: {burst: 3}}\n", "FILE:1: gateway.quota: expected: burst goes with requests_per_s"),
        (
            "gateway: {tenants: {acme: {}}}\n",
            "FILE:1: gateway: expected: tenants and auth.operators go with auth.keys_file or auth.jwt.keys_file",
        ),
        (
            "gateway: {auth: {keys_file: k, operators: ['a b']}}\n",
            "FILE:1: gateway: expected: tenants: got 'a b', expected a word of 1 to 128 characters without #",
        ),
        ("cluster: {address: nowhere}\n", "FILE:1: cluster.address: got 'nowhere', expected: ray, none, auto"),
        ("cluster: {address: 'h:99999'}\n", "FILE:1: cluster.address: got 'h:99999', expected: ray, none, auto"),
        ("- 1\n", "FILE: got a list, expected a mapping with the sections engine, prefill"),
        ("a: [\n", "FILE:2: is not YAML: "),
        ("a: \x00\n", "FILE: is not YAML: "),
        (b"a: \xff\n", "FILE: is not UTF-8 text: invalid start byte at byte 3"),
    ],
)
def test_mistakes_in_the_file(file, text, expected):
    assert problem(file(text)).startswith(expected)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"prefill": -1}, "--prefill: got -1, expected: greater than or equal to 0"),
        ({"decode": 0}, "--decode: got 0, expected: at least 1 where colocated is 0"),
        ({"grpc_port": 65536}, "--grpc-port: got 65536, expected: less than or equal to 65535"),
        (
            {"address": "ray:"},
            "--address: got 'ray:', expected: ray, none, auto, or HOST:PORT of an existing Ray cluster",
        ),
    ],
)
def test_mistakes_in_flags_name_the_flag(flags, expected):
    assert problem(None, **flags) == expected


def test_a_file_that_is_not_there(tmp_path):
    assert problem(tmp_path / "none.yaml") == "FILE: cannot be read: No such file or directory"
    assert problem(tmp_path) == "FILE: cannot be read: Is a directory"


def test_worker_names():
    config = load(None, {"--prefill": 1, "--decode": 2}).cluster
    assert worker_names(config) == [("prefill", "prefill-0"), ("decode", "decode-0"), ("decode", "decode-1")]


def test_configurations_on_the_pages_can_be_loaded(file):
    found = []
    for page in sorted((Path(__file__).parents[2] / "docs").glob("*.md")):
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
            path = file(block)
            if set(yaml.safe_load(block)) <= set(TandemConfig.model_fields):
                load(path)
                found.append(page.name)
            elif "scrape_configs" not in block:
                # What else there is: plans of `tandem chaos`, and what promtool reads (tests/metrics).
                read_plan(path, ("prefill-0", "prefill-1", "decode-0", "decode-1"))
    assert found.count("cluster.md") >= 3


def test_environment():
    assert read_environment({}).log_level is None
    assert read_environment({"TANDEM_LOG_LEVEL": "INFO"}).log_level == 20
    with pytest.raises(ConfigError, match="TANDEM_LOG_LEVEL: got 'loud', expected one of debug, info"):
        read_environment({"TANDEM_LOG_LEVEL": "loud"})
    read = read_environment({"TANDEM_API_KEY": "the-key\n"})
    assert read.api_key == "the-key"
    assert "the-key" not in repr(read)
    assert read_environment({}).api_key == ""


def test_one_ray_token_for_as_long_as_the_process_lives(monkeypatch):
    """Ray remembers the first."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED"):
        # Also puts back that there was none: what this test leaves must not be read by the next.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    prepare_ray(is_local=True)
    token = os.environ["RAY_AUTH_TOKEN"]
    prepare_ray(is_local=True)
    assert os.environ["RAY_AUTH_TOKEN"] == token
    assert len(token) == 64


@pytest.mark.parametrize(
    ("files", "most"),
    [
        ({}, 1024),
        ({"cpu.max": "max 100000\n"}, 1024),
        ({"cpu.max": "150000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "102400000 100000\n"}, 1024),
        ({"cpu.max": "what?"}, 1024),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1024),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
    ],
)
def test_a_container_has_the_cores_of_its_limit(tmp_path: Path, files: dict[str, str], most: int):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cores(tmp_path) == min(len(os.sched_getaffinity(0)), most)


def test_worker_variables_respect_the_users_own():
    assert worker_variables(3, {})["OMP_NUM_THREADS"] == "3"
    assert int(worker_variables(0, {})["OMP_NUM_THREADS"]) >= 1
    assert worker_variables(3, {"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"


def test_pinned_workers_share_the_cpus_and_none_is_left_over() -> None:
    cluster = load(None, {}).cluster.model_copy(update={"prefill": 1, "decode": 2, "pin_cpus": True})
    shares = [cpus_of(name, cluster, range(10, 18)) for _, name in worker_names(cluster)]
    assert shares == [(10, 11), (12, 13, 14), (15, 16, 17)]
    assert cpus_of("by-hand", cluster, range(8)) == ()
    assert cpus_of("decode-0", cluster.model_copy(update={"pin_cpus": False}), range(8)) == ()
    with pytest.raises(ConfigError, match="pin_cpus: 3 workers cannot each have a CPU of their own: there are 2"):
        cpus_of("decode-0", cluster, range(2))


def test_workers_on_several_machines_are_not_pinned(file) -> None:
    text = problem(file("cluster:\n  address: head:6379\n  pin_cpus: true\n"))
    assert "pin_cpus: got true, expected false" in text


def test_workers_on_one_machine_are_not_placed_by_labels(file) -> None:
    text = problem(file("cluster:\n  prefill_nodes: {gpu: H100}\n"))
    assert "prefill_nodes and decode_nodes: got labels, expected none where all workers are on one machine" in text


def test_labels_of_nodes(file) -> None:
    cluster = load(file("cluster:\n  address: auto\n  prefill_nodes: {gpu: H100}\n")).cluster
    assert cluster.is_remote
    assert (cluster.nodes_of("prefill"), cluster.nodes_of("decode")) == ({"gpu": "H100"}, {})


def test_a_worker_that_may_change_its_role_has_one_kind_of_node(file) -> None:
    text = "cluster:\n  address: auto\n  controller: {enabled: true}\n  prefill_nodes: {gpu: H100}\n"
    assert "expected false where prefill_nodes and decode_nodes differ" in problem(file(text))
    same = text + "  decode_nodes: {gpu: H100}\n"
    assert load(file(same)).cluster.controller.enabled
