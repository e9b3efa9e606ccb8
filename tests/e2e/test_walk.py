"""A newcomer's walk through the quick start, in a copy of the repository, as a user with an empty home."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden.default_model import require_default_model

pytestmark = [pytest.mark.model, pytest.mark.ray]
ROOT = Path(__file__).parents[2]
# Its own network: the well-known ports are free there, and nothing can be fetched that a newcomer would not have.
ISOLATED = ["unshare", "--net"]


def copy_of_the_repository(folder: Path) -> Path:
    """The files that git knows, and the environment that `make` has made."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to((ROOT / ".venv").resolve())
    # It is not older than what it was made from.
    for name in ("constraints.txt", "pyproject.toml"):
        os.utime(folder / name, (0, 0))
    return folder


@pytest.mark.timeout(900)
def test_the_quick_start_from_top_to_bottom(tmp_path: Path) -> None:
    require_default_model()
    if not (ROOT / ".venv" / ".installed").exists():
        pytest.skip("`make` has not made .venv here")
    if subprocess.run([*ISOLATED, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network of its own can be had here (unshare --net)")
    folder, home = tmp_path / "tandem", tmp_path / "home"
    home.mkdir()
    copy_of_the_repository(folder)
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], "XDG_CACHE_HOME": cache, "LANG": "C.UTF-8"}
    walk = [*ISOLATED, sys.executable, str(ROOT / "tests" / "e2e" / "walk.py"), str(folder)]
    done = subprocess.run(walk, env=environment, capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n$ ") >= 6
