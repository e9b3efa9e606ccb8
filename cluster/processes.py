"""Workers as plain child processes of this one, on this machine: no Ray.

    spawn ─▶ running ─ exit 2 ─▶ failed for good (its last line on stderr says why)
      ▲         ├─ exit 0 ─▶ again: it was told to end, by SIGTERM, and has drained
      ├─────────┼─ other exit, or no start at all ─▶ again, at most `max_restarts` times in a row
      └─────────┘
                └─ removed: SIGTERM ─▶ drained ─▶ exit 0

Each child holds the reading end of a pipe whose writing end only this process has. However this process ends, the pipe
closes, and the child with it: nothing is left behind.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from cluster.config import TandemConfig, to_json
from cluster.environment import child_environment
from cluster.fleet import Log
from cluster.registry import Role
from cluster.restarts import Restarts
from cluster.worker_spec import WorkerNames, worker_names
from engine.errors import ConfigError, NotFound, TandemError, Unavailable

USAGE_EXIT_CODE = 2
RESTART_PAUSE_S = 0.5
# A worker ends itself within ten seconds after `drain_s`, whatever hangs (cluster/watchdog.py).
KILL_AFTER_S = 15.0
LINE_BYTES_MAX = 1 << 16
# How the command line begins its one line about an error.
ERROR_PREFIX = "tandem: error: "
# Given its role and id: the beginning of a worker's command line, up to the role.
Program = Callable[[Role, str], Sequence[str]]


def worker_program(role: Role, worker_id: str) -> Sequence[str]:
    """`tandem worker`, by this Python."""
    return [sys.executable, "-P", "-m", "cluster.cli", "worker"]


@dataclass(slots=True, eq=False)
class _Child:
    """One worker. `is_extra`: added later, so that the service goes on without it. `process` None: not running now."""

    worker_id: str
    command: list[str]
    is_extra: bool = False
    is_leaving: bool = False
    process: asyncio.subprocess.Process | None = None
    task: asyncio.Task[None] | None = None


class ProcessFleet:
    """Implements cluster.fleet.Fleet."""

    def __init__(self, config: TandemConfig, log: Log, program: Program = worker_program) -> None:
        self._config = config
        self._log = log
        self._program = program
        self._folder = TemporaryDirectory(prefix="tandem-")
        self._path = Path(self._folder.name) / "config.json"
        self._children: dict[str, _Child] = {}
        self._names = WorkerNames(config.cluster)
        self._gateway = ""
        self._failure: TandemError | None = None

    async def open(self) -> str:
        return "127.0.0.1"

    async def start(self, gateway: str) -> None:
        self._gateway = gateway
        self._path.write_text(to_json(self._config), encoding="utf-8")
        for role, worker_id in worker_names(self._config.cluster):
            self._spawn(role, worker_id)

    def running(self) -> list[str]:
        """The ids of workers whose processes run now."""
        return [name for name, child in self._children.items() if child.process is not None]

    def signal(self, worker_id: str, number: signal.Signals) -> bool:
        """False where no process of the worker runs."""
        child = self._children.get(worker_id)
        if child is None or child.process is None or child.process.returncode is not None:
            return False
        child.process.send_signal(number)
        return True

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def worker_ids(self) -> list[str]:
        return list(self._children)

    def has(self, worker_id: str) -> bool:
        return worker_id in self._children

    async def add(self, role: Role) -> str:
        worker_id = self._names.next(role)
        self._spawn(role, worker_id, is_extra=True)
        return worker_id

    async def remove(self, worker_id: str) -> None:
        child = self._child(worker_id)
        assert child.task is not None, "a child has a task as long as it is known"
        child.is_leaving = True
        if child.process is None:
            # Between two lives: there is nothing to drain.
            child.task.cancel()
        else:
            child.process.terminate()
        await asyncio.wait([child.task], timeout=self._config.cluster.drain_s + KILL_AFTER_S)
        child.task.cancel()
        await asyncio.wait([child.task])

    async def restart(self, worker_id: str) -> None:
        process = self._child(worker_id).process
        if process is None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(self._config.cluster.drain_s + KILL_AFTER_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    async def close(self) -> None:
        tasks = [child.task for child in self._children.values() if child.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._folder.cleanup()

    def _child(self, worker_id: str) -> _Child:
        child = self._children.get(worker_id)
        if child is None:
            raise NotFound("worker", worker_id, ", ".join(self._children))
        return child

    def _spawn(self, role: Role, worker_id: str, *, is_extra: bool = False) -> None:
        options = ["--id", worker_id, "--gateway", self._gateway, "--config", str(self._path), "--lifeline"]
        child = _Child(worker_id, [*self._program(role, worker_id), role, *options], is_extra)
        self._children[worker_id] = child
        child.task = asyncio.create_task(self._keep_running(child), name=worker_id)
        child.task.add_done_callback(lambda _: self._children.pop(worker_id, None))

    async def _keep_running(self, child: _Child) -> None:
        clock = asyncio.get_running_loop().time
        restarts = Restarts(self._config.cluster.max_restarts, clock())
        while True:
            code, last_line = await self._run_once(child)
            if child.is_leaving:
                self._log(f"worker {child.worker_id} has left")
                return
            if code == USAGE_EXIT_CODE:
                self._fail(child, ConfigError(f"worker {child.worker_id}: {last_line}"))
                return
            if code == 0:
                self._log(f"worker {child.worker_id} has drained; starting it again")
                continue
            may_start = restarts.died(clock())
            self._log(f"worker {child.worker_id} {_ending(code, last_line)}; {restarts.then(may_start)}")
            if not may_start:
                self._fail(child, Unavailable(f"worker {child.worker_id} died too often: {last_line}"))
                return
            await asyncio.sleep(RESTART_PAUSE_S)

    def _fail(self, child: _Child, error: TandemError) -> None:
        if child.is_extra:
            self._log(f"{error}; going on without it")
        else:
            self._failure = error

    async def _run_once(self, child: _Child) -> tuple[int | None, str]:
        """Runs the worker to its end; returns its exit code and the last line it wrote to stderr, or None and why it
        could not be started."""
        try:
            process = await asyncio.create_subprocess_exec(
                *child.command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env=child_environment(self._config.engine.threads),
                # Ctrl-C in the terminal is for this process, which then ends the workers in order.
                start_new_session=True,
                limit=LINE_BYTES_MAX,
            )
        except OSError as error:
            # No more processes, files or memory, for the moment perhaps.
            return None, str(error.strerror)
        child.process = process
        try:
            last_line = await self._relay(child.worker_id, process)
            return await process.wait(), last_line
        finally:
            child.process = None
            await _end(process, self._config.cluster.drain_s + KILL_AFTER_S)

    async def _relay(self, worker_id: str, process: asyncio.subprocess.Process) -> str:
        """Passes the worker's stderr on until it closes."""
        assert process.stderr is not None, "stderr is a pipe"
        last_line = "it said nothing"
        while True:
            try:
                raw = await process.stderr.readline()
            except ValueError:
                continue  # A line longer than LINE_BYTES_MAX was dropped.
            if not raw:
                return last_line.removeprefix(ERROR_PREFIX)
            line = raw.decode("utf-8", "replace").rstrip()
            last_line = line or last_line
            if line.startswith("{") and self._config.logging.format == "json":
                # It says itself whose it is, and is to stay one object.
                print(line, file=sys.stderr, flush=True)
            elif line and not line.startswith(ERROR_PREFIX):
                self._log(f"{worker_id}: {line}")


def _ending(code: int | None, last_line: str) -> str:
    """How a life ended, in words."""
    if code is None:
        return f"could not be started: {last_line}"
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"


async def _end(process: asyncio.subprocess.Process, timeout_s: float) -> None:
    """Asks the process to stop, and kills it when it has not done so in time."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(timeout_s):
            await process.communicate()
    except TimeoutError:
        process.kill()
        await process.communicate()
