"""Building, loading and steering the C++ library."""

from __future__ import annotations

import logging
import os
import threading

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
