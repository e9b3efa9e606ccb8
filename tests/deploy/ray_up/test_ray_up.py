"""`ray up` for real, over ssh, on two machines that are namespaces of this one: `make test-ray-up`. Some minutes."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

from engine.model_source import cached_default
from tests.deploy.ray_up.caller import LOGIN
from tests.deploy.ray_up.machines import TOOLS, alone
from tests.golden.default_model import require_default_model

ROOT = Path(__file__).parents[3]
WHEELS = ROOT / "build" / "ray-up-wheels"
LIMIT_S = 2400

pytestmark = [pytest.mark.model, pytest.mark.ray, pytest.mark.nightly]


@pytest.mark.timeout(2 * LIMIT_S)
def test_up_serve_submit_down():
    require_default_model()
    require_machines()
    model = cached_default()
    assert model is not None
    paths = os.pathsep.join((str(ROOT), str(ROOT / "proto")))
    # Some gigabytes, which pytest would keep.
    with tempfile.TemporaryDirectory(prefix="tandem-ray-up-") as folder:
        story = [sys.executable, "-m", "tests.deploy.ray_up.rehearsal", folder, str(wheels()), str(model)]
        try:
            subprocess.run(alone(*story), check=True, timeout=LIMIT_S, env={**os.environ, "PYTHONPATH": paths})
        finally:
            shutil.rmtree(f"/tmp/ray_ssh_{hashlib.sha256(LOGIN.encode()).hexdigest()[:10]}", ignore_errors=True)


def require_machines() -> None:
    """Skips where machines cannot be made."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("needs root on Linux: machines are namespaces")
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: apt install openssh-server rsync iproute2 util-linux git")
    tried = subprocess.run(alone("mount", "-t", "tmpfs", "tmpfs", "/run"), capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"this machine allows no namespaces of one's own: {tried.stderr.strip()}")


def wheels() -> Path:
    """A folder with all that a node installs. Made anew where the pins have changed."""
    pins = [ROOT / name for name in ("constraints.txt", "pyproject.toml", "Makefile")]
    have = WHEELS / hashlib.sha256(b"".join(file.read_bytes() for file in pins)).hexdigest()
    if not have.exists():
        shutil.rmtree(WHEELS, ignore_errors=True)
        WHEELS.mkdir(parents=True)
        ours = WHEELS / "torch.txt"
        # The build that is installed here: for CPUs or for CUDA.
        ours.write_text(f"torch=={version('torch')}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "-d", WHEELS, "-c", "constraints.txt", "-c", ours]
        subprocess.run([*pip, "setuptools>=77", "."], check=True, cwd=ROOT)
        have.touch()
    return WHEELS
