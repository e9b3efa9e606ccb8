"""Tasks beside the requests: what is told of one that ends."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from cluster.background import tell_of_crash


async def test_a_bug_is_told_with_where_it_came_from_and_an_end_is_not(caplog: pytest.LogCaptureFixture) -> None:
    async def crash() -> None:
        raise KeyError("bug")

    tasks = [asyncio.create_task(crash()), asyncio.create_task(asyncio.sleep(60))]
    for task in tasks:
        task.add_done_callback(partial(tell_of_crash, "a part has crashed"))
    await asyncio.sleep(0)
    tasks[1].cancel()
    await asyncio.wait(tasks)
    await asyncio.sleep(0)
    [record] = caplog.records
    assert record.getMessage() == "a part has crashed"
    assert record.exc_info is not None
    assert record.exc_info[0] is KeyError
