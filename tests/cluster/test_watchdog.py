"""A process whose event loop stands ends by itself, and says where; one that was only stopped goes on."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from cluster.watchdog import EXIT_CODE, TICK_S, Watchdog

SCRIPT = """
import asyncio, sys, time
from cluster.watchdog import Watchdog

def stand():
    time.sleep(60)

async def main():
    watchdog = Watchdog(1.0)
    print("up", flush=True)
    await asyncio.sleep(0.5)
    {then}
    watchdog.stop()

asyncio.run(main())
"""


def start(then: str) -> subprocess.Popen[str]:
    """A process with a watchdog, half a second before it does what it is told."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(then=then)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


async def until(holds: Callable[[], object], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def test_a_loop_that_stands_ends_the_process_and_shows_where():
    process = start("stand()")
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == EXIT_CODE
    assert stderr.startswith("tandem: the event loop has not turned for 1 s; ending the process\n")
    assert "in stand" in stderr


def test_a_process_that_was_stopped_goes_on():
    process = start("await asyncio.sleep(2)")
    time.sleep(0.5)
    process.send_signal(signal.SIGSTOP)
    time.sleep(4.0)
    process.send_signal(signal.SIGCONT)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (0, "")


async def test_what_takes_too_long_to_end_is_ended():
    ended: list[str] = []
    watchdog = Watchdog(60.0, ended.append)
    watchdog.end_within(60.0, "late")
    watchdog.end_within(2 * TICK_S, "the worker has not ended in time")
    watchdog.end_within(30.0, "later")
    await until(lambda: ended)
    assert ended == ["the worker has not ended in time"]


def test_a_worker_that_only_loads_ends_at_once_and_silently():
    process = start("watchdog.end_worker_within(60.0, is_serving=False); await asyncio.sleep(30)")
    began_s = time.monotonic()
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (0, "")
    assert time.monotonic() - began_s < 10.0


async def test_what_ends_in_time_is_left_alone():
    ended: list[str] = []
    watchdog = Watchdog(2 * TICK_S, ended.append)
    watchdog.end_within(2 * TICK_S, "late")
    watchdog.stop()
    await asyncio.sleep(6 * TICK_S)
    assert ended == []
