"""`make test-gpu bench-gpu` needs torch, triton and pytest, and neither Ray nor what else only a server takes: here
those packages are refused, and all that comes before the first kernel must go on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ABSENT = (
    "ray",
    "pydantic",
    "gguf",
    "pytest_asyncio",
    "grpc_health",
    "grpc_reflection",
    "prometheus_client",
    "mypy",
    "tandem",
)
# Python runs a module of this name before anything else.
SITECUSTOMIZE = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}: refused by a test", name=name)

sys.meta_path.insert(0, Absent())
"""


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of processes that have none of ABSENT."""
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    for name in ("TRITON_INTERPRET", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    return environment


def run(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_they_are_refused(bare: dict[str, str]) -> None:
    done = run(bare, sys.executable, "-c", "import pydantic")
    assert "refused by a test" in done.stderr


def test_gpu_tests_are_found(bare: dict[str, str]) -> None:
    """As `make test-gpu` looks for them: every file that gpu.ini names, each with tests on the GPU and no others."""
    done = run(
        bare,
        *(sys.executable, "-m", "pytest", "-c", "tests/gpu.ini", "--rootdir", ".", "-m", "gpu"),
        *("-p", "pytest_timeout", "--collect-only"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"^(tests/[\w/]+\.py)::.*\[.*\]", done.stdout, re.MULTILINE)
    ini = (ROOT / "tests" / "gpu.ini").read_text(encoding="utf-8")
    named = re.findall(r"^    (tests/\S+)$", ini, re.MULTILINE)
    assert len(named) >= 3
    for name in named:
        assert any(path == name or path.startswith(f"{name}/") for path in found), f"{name} has no test for a GPU"
    assert not re.search(r"\[.*interpreter.*\]$", done.stdout, re.MULTILINE)


def test_kernels_are_measured(bare: dict[str, str]) -> None:
    done = run({**bare, "TRITON_INTERPRET": "1"}, sys.executable, "-m", "bench.kernels", "--smoke")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^\| (?:decode|prefill) attention", done.stdout, re.MULTILINE)) >= 7
    assert "failed" not in done.stdout


def test_the_engine_is_measured(bare: dict[str, str]) -> None:
    """With two processes, as `python -m bench.engine` is run, but for the ceilings."""
    flags = "--random tiny --rounds 1 --no-transformers --prefill 32 --batches 1,2 --steps 4 --threads 1"
    script = "import sys; from bench.engine import *; print(run(parse(sys.argv[1:]), Ceilings(1e9, 1e9, 1e9)))"
    done = run(bare, sys.executable, "-c", script, *flags.split())
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines()[2:5]]
    assert [row[1].strip() for row in rows] == ["prefill, 32 tokens", "decode, batch 1", "decode, batch 2"]
    assert all(float(row[2].replace(",", "")) > 0 for row in rows)


def test_without_a_gpu_make_says_so(bare: dict[str, str]) -> None:
    targets = ("test-gpu", "bench-gpu", "bench-kernels")
    done = run({**bare, "CUDA_VISIBLE_DEVICES": ""}, "make", "--keep-going", f"GPU_PYTHON={sys.executable}", *targets)
    assert done.returncode == 2
    assert done.stderr.startswith("no CUDA device")
    assert all(f"Target '{target}' not remade" in done.stderr for target in targets)
