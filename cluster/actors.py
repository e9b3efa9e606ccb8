"""A worker inside a Ray actor, or one actor for each of its ranks. Ray places them and starts them again; tokens and
tensors never pass through Ray."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING

import ray.util
import uvloop

from cluster.collector import set_aside_what_is_loaded
from cluster.config import from_json
from cluster.logs.lines import set_up_logs
from cluster.watchdog import Watchdog
from cluster.worker_spec import WorkerSpec
from engine.errors import TandemError

if TYPE_CHECKING:
    from engine.ranks import Rendezvous

# How long a process that has crashed still lives, so that what it crashed with reaches the launcher.
LAST_WORDS_S = 0.3


class Crashed(Exception):
    """The worker's loop has crashed; the process is about to end."""


class WorkerActor:
    """Runs one worker, or the leader of its ranks, on an event loop of its own, in the thread that `run` is called in.

    Ray calls methods of this actor from several threads (`max_concurrency`), so `stop` works while `run` runs.
    """

    def __init__(self, spec: WorkerSpec, config_json: str, is_remote: bool) -> None:
        # Of this process, so larger after every restart.
        self._incarnation = time.time_ns()
        self._config = from_json(config_json)
        self._spec = replace(spec, host=_own_host(is_remote))
        self._rendezvous: Rendezvous | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._watchdog: Watchdog | None = None
        self._is_serving = self._is_stopping = False

    def rendezvous(self) -> str:
        """Where the other ranks of the next `run` find this one: HOST:PORT."""
        # Imported here, because the launcher imports this file and has no use for torch.
        from engine.ranks import Rendezvous

        self._rendezvous = Rendezvous.open(self._spec.host)
        return self._rendezvous.address

    def run(self) -> str:
        """Runs the worker until `stop`. Returns "" then, and the error's text when it can never run.

        A crash raises Crashed and ends the process right after, for Ray to start it again: a worker whose pool is
        broken must not linger.
        """

        def serving(address: str) -> None:
            set_aside_what_is_loaded()
            self._is_serving = True

        # Not a method: Ray would take a class with coroutines for an asyncio actor and call `run` in its own loop.
        async def serve() -> None:
            # Imported here, as above; and before the watchdog looks on: the loop does not turn meanwhile.
            from cluster.worker_process import run_worker

            set_up_logs(self._config.logging, self._spec.worker_id)
            self._watchdog = watchdog = Watchdog()
            self._task = asyncio.current_task()
            self._loop = asyncio.get_running_loop()
            # After those above: either `stop` finds them, or its flag is found here.
            if not self._is_stopping:
                await run_worker(
                    self._spec,
                    self._config,
                    incarnation=self._incarnation,
                    serving=serving,
                    rendezvous=self._rendezvous,
                    watchdog=watchdog,
                )

        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(serve())
        except asyncio.CancelledError:
            return ""
        except TandemError as error:
            return str(error)
        except BaseException as error:  # The top of a process: whatever it is, the process must not outlive it.
            raise _crashed(error) from None
        finally:
            if self._watchdog is not None:
                self._watchdog.stop()
        return ""

    def crash(self) -> None:
        """Ends the process at once: another rank of this worker has died."""
        os._exit(1)

    def stop(self) -> None:
        """Asks the worker to drain and end, within `drain_s` and a little more; does not wait."""
        self._is_stopping = True
        if self._watchdog is not None:
            self._watchdog.end_worker_within(self._config.cluster.drain_s, is_serving=self._is_serving)
        if self._loop is not None and self._task is not None:
            self._loop.call_soon_threadsafe(self._task.cancel)

    def wait(self) -> None:
        """Returns: this process is there."""


class RankActor:
    """Runs one rank that is not its worker's leader."""

    def __init__(self, rank: int, config_json: str, is_remote: bool) -> None:
        self._rank = rank
        self._config = from_json(config_json)
        self._host = _own_host(is_remote)

    def wait(self) -> None:
        """Returns: this process is there."""

    def run(self, rendezvous: str) -> str:
        """Runs the rank until its leader, which is found at `rendezvous`, says stop. As WorkerActor.run."""
        from cluster.rank_process import follow_leader

        try:
            follow_leader(self._config, self._rank, rendezvous, self._host)
        except TandemError as error:
            return str(error)
        except BaseException as error:
            raise _crashed(error) from None
        return ""


def _own_host(is_remote: bool) -> str:
    return str(ray.util.get_node_ip_address()) if is_remote else "127.0.0.1"  # type: ignore[no-untyped-call]


def _crashed(error: BaseException) -> Crashed:
    """What to raise instead; the process ends right after."""
    traceback.print_exception(error)
    # Not sys.exit: in a thread that would end the thread only.
    threading.Timer(LAST_WORDS_S, os._exit, (1,)).start()
    return Crashed(f"{type(error).__name__}: {error}")
