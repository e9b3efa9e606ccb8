"""Workers as child processes: what becomes of one that cannot be started."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from typing import Any

import pytest

from cluster import processes
from cluster.config import TandemConfig
from cluster.processes import ProcessFleet
from engine.errors import Unavailable
from tests.eventually import eventually

CONFIG = TandemConfig.model_validate({"cluster": {"prefill": 0, "decode": 1, "max_restarts": 2}})


@pytest.mark.parametrize("failing", [(2,), (1, 2, 3)])
async def test_a_start_that_the_system_refuses_is_a_death_as_any_other(
    failing: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "RESTART_PAUSE_S", 0.01)
    start, starts, lines = asyncio.create_subprocess_exec, 0, list[str]()

    async def refuse(*command: str, **options: Any) -> asyncio.subprocess.Process:
        nonlocal starts
        starts += 1
        if starts in failing:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return await start(*command, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", refuse)
    fleet = ProcessFleet(CONFIG, lines.append, lambda role, worker_id: [sys.executable, "-c", "raise SystemExit(9)"])
    try:
        await fleet.start("127.0.0.1:1")
        await eventually(lambda: not fleet.worker_ids(), 20.0)
        with pytest.raises(Unavailable, match=r"^worker decode-0 died too often: "):
            fleet.check()
    finally:
        await fleet.close()
    refused, ended = "could not be started: Resource temporarily unavailable", "ended with exit code 9"
    ends = [refused if number in failing else ended for number in (1, 2, 3)]
    then = ["starting it again (1 more)", "starting it again (0 more)", "giving it up"]
    assert lines == [f"worker decode-0 {end}; {what}" for end, what in zip(ends, then, strict=True)]
