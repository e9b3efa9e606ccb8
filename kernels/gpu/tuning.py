"""Which tile sizes a kernel runs with: measured once per device, kept in `tuned/<device>.json`, else the first guess.

Kernels list their candidates, the best guess for an H200 first, and ask `choose` at every launch: after the first
time that is one look into a dictionary. Only benchmarks measure (`enable`), so a server never stops to tune.

A file's choices count only for the Triton version that they were measured with, and a choice only while it is one of
the kernel's candidates: so a stale file does no harm.
"""

from __future__ import annotations

import functools
import json
import os
import re
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

Key = tuple[int | str, ...]

REPEATS = 25
# More than any GPU's L2 cache (an H200 has 50 MiB): writing it makes the next launch read from memory.
FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Config:
    """How to launch a kernel: tile sizes under the kernel's own names for them, warps and pipeline stages."""

    sizes: dict[str, int]
    num_warps: int
    num_stages: int = 1


def device_name() -> str | None:
    """The current GPU's name as a file is called; None where Triton interprets or no GPU is."""
    is_interpreted = not isinstance(triton.language.zeros, JITFunction)
    if is_interpreted or not torch.cuda.is_available():
        return None
    return re.sub(r"\W+", "_", torch.cuda.get_device_name())


def time_ms(run: Callable[[], None]) -> float:
    """Median of the GPU's time for one launch with a cold L2 cache."""
    assert not torch.cuda.is_current_stream_capturing(), "tune before a CUDA graph is captured"
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    run()
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        # The GPU is busy with this for longer than the host needs to queue the launch.
        flush.zero_()
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(float(start.elapsed_time(end)) for start, end in events)


class Tuner:
    """Choices of one process, and the files that they come from and go to."""

    def __init__(
        self,
        folder: Path,
        device_name: Callable[[], str | None] = device_name,
        time_ms: Callable[[Callable[[], None]], float] = time_ms,
    ) -> None:
        self._folder = folder
        self._device_name = device_name
        self._time_ms = time_ms
        self._is_enabled = False
        # One process has one kind of GPU.
        self._chosen: dict[tuple[str, Key], Config] = {}

    def enable(self) -> None:
        """From now on measures what no file has, and saves it."""
        self._is_enabled = True
        self._chosen.clear()

    def choose(self, kernel: str, key: Key, candidates: Sequence[Config], run: Callable[[Config], None]) -> Config:
        """The best of `candidates` for (this device, `kernel`, `key`).

        `run` launches the kernel with one of them; it is called many times while measuring, so it must give the same
        result each time. Candidates that do not compile or do not fit the device are left out. Raises what the last
        of them raised where none is left.
        """
        if (chosen := self._chosen.get((kernel, key))) is None:
            chosen = self._chosen[kernel, key] = self._find(kernel, key, candidates, run)
        return chosen

    def _find(self, kernel: str, key: Key, candidates: Sequence[Config], run: Callable[[Config], None]) -> Config:
        name = self._device_name()
        if name is None:
            return candidates[0]
        path = self._folder / f"{name}.json"
        label = ",".join(map(str, key))
        fields = _read(path).get(kernel, {}).get(label)
        if fields is not None and (saved := Config(**fields)) in candidates:
            return saved
        if not self._is_enabled:
            return candidates[0]
        fastest = self._fastest(candidates, run)
        # Read again: another process may have saved while this one measured.
        choices = _read(path)
        choices.setdefault(kernel, {})[label] = asdict(fastest)
        _write(path, choices)
        return fastest

    def _fastest(self, candidates: Sequence[Config], run: Callable[[Config], None]) -> Config:
        times: list[tuple[float, int]] = []
        failure: Exception | None = None
        for index, config in enumerate(candidates):
            try:
                times.append((self._time_ms(functools.partial(run, config)), index))
            except (OutOfResources, CompilationError, RuntimeError) as error:
                # RuntimeError: a compiler pass that gave up on these sizes.
                failure = error
        if not times:
            raise failure or AssertionError("a kernel has at least one candidate")
        return candidates[min(times)[1]]


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Kernel → key → a Config's fields. Nothing where the file is of another Triton, or missing."""
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["choices"] if content["triton"] == triton.__version__ else {}


def _write(path: Path, choices: dict[str, dict[str, Any]]) -> None:
    """Whole or not at all: a process that reads meanwhile sees the file of before or after."""
    path.parent.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        json.dump({"triton": triton.__version__, "choices": choices}, file, indent=1, sort_keys=True)
        file.write("\n")
    # Such a file is made for its owner alone; this one is for everybody to read.
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


_tuner = Tuner(Path(__file__).parent / "tuned")
choose = _tuner.choose
enable = _tuner.enable
