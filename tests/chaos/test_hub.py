"""The line between a run and its workers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cluster.chaos.hub import connected, running_hub
from tests.eventually import eventually


async def test_notes_go_one_way_and_orders_the_other(tmp_path: Path) -> None:
    notes: list[tuple[str, Any]] = []
    orders: list[Any] = []
    async with running_hub(tmp_path, lambda name, note: notes.append((name, note))) as hub:
        assert not hub.tell("decode-0", {"corrupt": 5}), "nobody is there yet"
        async with connected(hub.path, "decode-0", orders.append) as line, connected(hub.path, "p", orders.append):
            line.note({"held": 3})
            line.note({"held": 0})
            await eventually(lambda: len(notes) == 2)
            assert notes == [("decode-0", {"held": 3}), ("decode-0", {"held": 0})]
            assert hub.tell("decode-0", {"corrupt": 5})
            assert hub.tell("decode-0", {"corrupt": 0})
            await eventually(lambda: len(orders) == 2)
            assert orders == [{"corrupt": 5}, {"corrupt": 0}]
        await eventually(lambda: len(notes) == 4)
        assert sorted(notes[2:]) == [("decode-0", {}), ("p", {})]
        assert not hub.tell("decode-0", {"corrupt": 5}), "it is gone"


async def test_a_successor_is_told_and_not_its_predecessor(tmp_path: Path) -> None:
    notes: list[Any] = []
    old: list[Any] = []
    new: list[Any] = []
    async with running_hub(tmp_path, lambda name, note: notes.append(note)) as hub:
        async with connected(hub.path, "d", old.append) as first:
            first.note({"held": 1})
            await eventually(lambda: notes)
            async with connected(hub.path, "d", new.append) as second:
                second.note({"held": 2})
                await eventually(lambda: len(notes) == 2)
                hub.tell("d", {"corrupt": 1})
                await eventually(lambda: new)
        assert not old


async def test_who_says_nothing_is_nobody(tmp_path: Path) -> None:
    async with running_hub(tmp_path, lambda name, note: pytest.fail("nobody said anything")) as hub:
        _, writer = await asyncio.open_unix_connection(hub.path)
        writer.close()
        await writer.wait_closed()
        await asyncio.sleep(0.05)
