"""Building, loading and steering the C++ library."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kernels.cpu.library import Unavailable, build, load

library = load()


@pytest.mark.skipif(library is None, reason="this machine has no C++ kernels")
def test_it_is_built_once() -> None:
    path = build()
    built_at = path.stat().st_mtime_ns
    assert build() == path
    assert path.stat().st_mtime_ns == built_at


def test_without_a_compiler_there_is_no_library(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Unavailable):
        build()
    with caplog.at_level(logging.WARNING):
        assert load.__wrapped__() is None
    assert len(caplog.records) == 1
    assert "plain torch computes instead" in caplog.text


@pytest.mark.skipif(library is None, reason="this machine has no C++ kernels")
def test_threads_can_be_more_and_fewer() -> None:
    assert library is not None
    before = library.threads()
    for count in (1, 4, 2, 7):
        library.set_threads(count)
        assert library.threads() == count
    library.set_threads(before)


@pytest.mark.skipif(library is None, reason="this machine has no C++ kernels")
def test_pinning_binds_the_caller() -> None:
    """In a thread of its own, whose mask goes with it. The pool's next threads are spread over all CPUs again."""
    assert library is not None
    allowed = sorted(os.sched_getaffinity(0))
    seen: list[set[int]] = []

    def pin() -> None:
        library.pin([allowed[-1]])
        seen.append(os.sched_getaffinity(0))
        with pytest.raises(OSError, match="cannot bind threads to CPUs"):
            library.pin([1 << 20])
        library.pin(allowed)
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=pin)
    thread.start()
    thread.join()
    assert seen == [{allowed[-1]}, {allowed[0]}]


@pytest.mark.skipif(library is None, reason="this machine has no C++ kernels")
def test_a_portable_library_needs_no_compiler_where_it_is_used(tmp_path: Path) -> None:
    """As in an image: built in one place, used in another that has no g++, and whose folders cannot be written."""
    root = Path(__file__).parents[3]
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    shutil.copytree(
        root / "kernels" / "cpu", tmp_path / "kernels" / "cpu", ignore=shutil.ignore_patterns("build", "__pycache__")
    )

    def run(*words: str, **variables: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1", **variables}
        return subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
        ).stdout

    built = run("-m", "kernels.cpu.library", "--portable")
    assert f"C++ kernels: {tmp_path}/kernels/cpu/build/libtandem-portable-" in built
    files = sorted((tmp_path / "kernels" / "cpu" / "build").iterdir())
    assert run("-m", "kernels.cpu.library", PATH="") == built
    assert run("-c", "from kernels.cpu.library import load; print(load().threads() > 0)", PATH="") == "True\n"
    assert sorted((tmp_path / "kernels" / "cpu" / "build").iterdir()) == files
