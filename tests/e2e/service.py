"""Runs the command line as a user does: real processes, real sockets, the default model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TANDEM = [sys.executable, "-m", "cluster.cli"]
START_S = 120.0
STOP_S = 20.0
# Small, so that a worker starts fast; still room for some thousand tokens. Every prompt takes the way over the link:
# the goodput policy would compute short ones where they are decoded.
CONFIG = """
engine: {kv_cache_bytes: 67108864}
gateway: {heartbeat_interval_s: 0.2, fresh_s: 1.5, expire_s: 5, router: {policy: least_loaded}}
cluster: {grpc_port: 0, drain_s: 2}
"""


def tandem(*arguments: str, timeout_s: float = 90.0, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs one command to its end."""
    return subprocess.run(
        [*TANDEM, *arguments], capture_output=True, text=True, timeout=timeout_s, input=stdin, check=False
    )


def error_of(result: subprocess.CompletedProcess[str]) -> str:
    """The one line that a command which must fail wrote to stderr."""
    assert result.returncode == 2, result
    assert result.stderr.startswith("tandem: error: "), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr.removeprefix("tandem: error: ").rstrip("\n")


@dataclass
class Served:
    """A running `tandem serve`."""

    process: subprocess.Popen[str]
    address: str
    log: Path

    @property
    def openai_url(self) -> str:
        """What clients of OpenAI's interface are given."""
        match = re.search(r"^OpenAI's interface at (\S+)$", self.log.read_text(), re.MULTILINE)
        assert match, self.log.read_text()
        return match[1]

    def generate(self, *arguments: str) -> list[dict[str, Any]]:
        result = tandem("generate", "--url", self.address, "--json", *arguments)
        assert result.returncode == 0, result.stderr
        return [json.loads(line) for line in result.stdout.splitlines()]

    def status(self) -> dict[str, Any]:
        result = tandem("status", "--url", self.address, "--json")
        assert result.returncode == 0, result.stderr
        status: dict[str, Any] = json.loads(result.stdout)
        return status

    def workers(self) -> dict[str, dict[str, Any]]:
        return {worker["worker_id"]: worker for worker in self.status()["workers"] if worker["fresh"]}

    def is_idle(self) -> bool:
        """Nothing runs, and every worker's KV blocks can be had."""
        status = self.status()
        held = [worker["blocks_total"] - worker["blocks_free"] for worker in status["workers"] if worker["fresh"]]
        return status["requests_running"] == 0 and bool(held) and not any(held)

    def descendants(self) -> dict[int, str]:
        """Command lines of all processes that this one started, directly or not, by process id."""
        children: dict[int, list[int]] = {}
        for pid, parent in parents().items():
            children.setdefault(parent, []).append(pid)
        found: dict[int, str] = {}
        todo = [self.process.pid]
        while todo:
            for child in children.get(todo.pop(), []):
                found[child] = command_line(child)
                todo.append(child)
        return found

    def stop(self, number: int = signal.SIGTERM) -> int:
        """The exit code."""
        self.process.send_signal(number)
        return self.process.wait(STOP_S)


@contextmanager
def serving(
    folder: Path, *arguments: str, config: str = CONFIG, variables: Mapping[str, str] | None = None
) -> Iterator[Served]:
    """A service that is ready when the context is entered; nothing of it is left when the context is left."""
    file = folder / "tandem.yaml"
    file.write_text(config)
    log = folder / "serve.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*TANDEM, "serve", "--config", str(file), *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(variables or {})},
        )
    served = Served(process, "", log)
    left: set[int] = set()
    try:
        eventually(lambda: process.poll() is not None or "\ntry:" in log.read_text(), START_S)
        match = re.search(r"^serving .* at (\S+)$", log.read_text(), re.MULTILINE)
        assert match, log.read_text()
        served.address = match[1]
        yield served
        left = set(served.descendants())
    finally:
        if process.poll() is None:
            served.stop()
        for pid in left:
            eventually(lambda pid=pid: not is_alive(pid), STOP_S)


def eventually(holds: Callable[[], object], timeout_s: float) -> None:
    give_up_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < give_up_s, f"not so within {timeout_s:g} s"
        time.sleep(0.05)


def parents() -> dict[int, int]:
    """Every process's parent."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in brackets may hold anything, spaces included.
            found[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
    return found


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def is_alive(pid: int) -> bool:
    """False for a zombie too: it holds nothing any more."""
    return bool(command_line(pid))


def kill(pids: Sequence[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
