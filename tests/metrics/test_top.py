"""`tandem top`: what it shows at which width, and how it ends."""

from __future__ import annotations

import asyncio
import io
import os
import pty
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from rich.console import Console
from tandem.v1.inference_pb2 import GetStatusResponse, WorkerStatus

from cluster.cli import run_command
from cluster.commands.status import status_table
from cluster.commands.top import top
from cluster.commands.top_screen import Moment, screen
from cluster.inference_server import inference_service
from kvtransfer.rpc_server import start_server
from tests.cluster.fake_decode import FakeDecode
from tests.cluster.serving import ANSWER, TO_THE_END, collect, serving


def worker(name: str, role: str, **fields: object) -> WorkerStatus:
    return WorkerStatus(
        **{
            "worker_id": name,
            "role": role,
            "incarnation": 7,
            "fresh": True,
            "blocks_total": 64,
            "blocks_free": 16,
            "heartbeat_age_s": 0.4,
            **fields,
        }
    )


def status(**fields: object) -> GetStatusResponse:
    workers = fields.pop("workers", [worker("prefill-0", "prefill"), worker("decode-0", "decode", kv_bytes=1 << 20)])
    return GetStatusResponse(model="tiny", router="goodput", workers=workers, **fields)


BEFORE = Moment(100.0, status(generation_tokens=1000, requests_finished=10))
NOW = Moment(102.0, status(generation_tokens=1500, requests_finished=13))


def lines(now: Moment, before: Moment | None, width: int, height: int = 1000, problem: str = "") -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, highlight=False)
    console.print(screen(now, before, width, height, problem))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [20, 34, 40, 50, 60, 79, 80, 100, 120, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    shown = lines(NOW, BEFORE, width)
    assert max(map(len, shown)) <= width
    # As many lines at every width: none has gone over into a second.
    assert len([line for line in shown if line.strip()]) == len(
        [line for line in lines(NOW, BEFORE, 200) if line.strip()]
    )
    for what in ("worker", "run", "KV", "prefill", "decode"):
        assert any(what in line for line in shown), what


def test_rates_are_of_what_came_between_two_looks() -> None:
    text = "\n".join(lines(NOW, BEFORE, 120))
    assert "250/s of answers" in text
    assert "1.5/s finished" in text
    # The first look shows no rates rather than wrong ones.
    assert "-/s of answers" in "\n".join(lines(NOW, None, 120))


def test_a_gateway_or_a_worker_that_began_anew_has_no_negative_rates() -> None:
    again = Moment(
        103.0, status(generation_tokens=5, workers=[worker("decode-0", "decode", incarnation=8, kv_bytes=0)])
    )
    text = "\n".join(lines(again, NOW, 120))
    assert "0/s of answers" in text
    assert "KV 0 B/s" in text
    moved = Moment(104.0, status(workers=[worker("decode-0", "decode", kv_bytes=5 << 20)]))
    assert "2.1 MB/s" in "\n".join(lines(moved, NOW, 120))


def test_states_and_full_pools() -> None:
    workers = [
        worker("a", "decode", draining=True, blocks_free=0),
        worker("b", "decode", fresh=False, blocks_free=64),
        worker("c", "decode", prefix_queries=10, prefix_hits=5),
    ]
    shown = lines(Moment(1.0, status(workers=workers)), None, 120)
    by_name = {line.split()[0]: line for line in shown if line.split() and line.split()[0] in ("a", "b", "c")}
    assert "draining" in by_name["a"]
    assert "100%" in by_name["a"]
    assert "silent" in by_name["b"]
    assert " 0%" in by_name["b"]
    assert "50%" in by_name["c"]
    assert "decode: 3 workers, 1 ready" in "\n".join(shown)
    assert "prefill: 0 workers" in "\n".join(shown)


def test_status_says_what_each_worker_is_and_does_in_80_columns() -> None:
    """Also over a pipe, where nothing is red."""
    busy = {"address": "127.0.0.1:45123", "queued_tokens": 123456, "cost_error_median": 0.1, "cost_error_p90": 0.25}
    workers = [
        worker("colocated-0", "decode", draining=True, **busy),
        worker("prefill-0", "prefill", fresh=False, heartbeat_age_s=21.3, **busy),
        worker("decode-0", "decode", **busy),
    ]
    console = Console(file=io.StringIO(), width=80)
    console.print(status_table(status(workers=workers)))
    rows = [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    numbers = ["127.0.0.1:45123", "0", "0", "123456", "75%", "10/25%"]
    assert ["colocated-0", "decode", "draining", *numbers, "0.4", "s"] in rows
    assert ["prefill-0", "prefill", "silent", *numbers, "21.3", "s"] in rows
    assert ["decode-0", "decode", "ready", *numbers, "0.4", "s"] in rows


def test_a_name_is_shown_as_it_is() -> None:
    names = ["[red]a", "[/b]", "c\\[d"]
    text = "\n".join(lines(Moment(1.0, status(workers=[worker(name, "decode") for name in names])), None, 120))
    assert all(name in text for name in names)
    console = Console(file=io.StringIO(), width=120)
    console.print(status_table(status(workers=[worker(name, "decode") for name in names])))
    assert all(name in console.file.getvalue() for name in names), "tandem status shows them, too"


def test_more_workers_than_rows() -> None:
    workers = [worker(f"d{index}", "decode") for index in range(100)]
    shown = lines(Moment(1.0, status(workers=workers)), None, 80, height=30)
    assert len(shown) <= 30
    assert any("more" in line for line in shown)


def test_what_is_wrong_is_said() -> None:
    assert any("no service answers" in line for line in lines(NOW, BEFORE, 80, problem="no service answers there"))


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def service() -> AsyncIterator[str]:
    async with serving(FakeDecode(ANSWER)) as gateway:
        await collect(gateway, TO_THE_END)
        server = await start_server("127.0.0.1:0", [inference_service(gateway)])
        try:
            yield server.address
        finally:
            await server.stop()


async def test_once_is_plain_text_with_rates() -> None:
    file = io.StringIO()
    async with service() as url:
        await top(url, interval_s=0.1, is_once=True, console=Console(file=file, width=100, highlight=False))
    shown = file.getvalue()
    assert "\x1b" not in shown
    assert shown.count("decode: 1 worker") == 1
    assert "0/s of answers" in shown
    assert "100.0% of 1 met both" in shown


async def test_without_a_terminal_it_goes_on_in_plain_text() -> None:
    file = io.StringIO()
    async with service() as url:
        showing = asyncio.create_task(top(url, interval_s=0.1, console=Console(file=file, width=80, highlight=False)))
        async with asyncio.timeout(60):
            while file.getvalue().count("objectives") < 3:  # noqa: ASYNC110 - a file has no event
                await asyncio.sleep(0.05)
        showing.cancel()
        await asyncio.wait([showing])
    assert "\x1b" not in file.getvalue()


async def on_terminal(url: str, keys: bytes) -> tuple[int, bytes]:
    """Runs `tandem top` on a terminal, and presses `keys` when it has shown something. Its exit code, and all of it."""
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "cluster.cli", "top", "--url", url, "--interval-s", "0.1"]
    process = await asyncio.create_subprocess_exec(
        *words, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"}, start_new_session=True
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    shown = bytearray()
    seen = asyncio.Event()

    def read() -> None:
        try:
            shown.extend(os.read(ours, 1 << 16))
        except OSError:
            # Nobody has the other end any more.
            asyncio.get_running_loop().remove_reader(ours)
        if b"decode: 1 worker" in shown:
            seen.set()

    asyncio.get_running_loop().add_reader(ours, read)
    try:
        async with asyncio.timeout(120):
            await seen.wait()
            if keys == b"\x03":
                process.send_signal(2)
            else:
                os.write(ours, keys)
            code = await process.wait()
            return code, bytes(shown)
    finally:
        asyncio.get_running_loop().remove_reader(ours)
        os.close(ours)
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("keys", [b"q", b"Q", b"xq", b"\x03"])
async def test_it_has_the_screen_until_a_key_ends_it(keys: bytes) -> None:
    async with service() as url:
        code, shown = await on_terminal(url, keys)
    assert code == 0, shown
    # The other screen is entered, and left again.
    assert b"\x1b[?1049h" in shown
    assert b"\x1b[?1049l" in shown


def test_nobody_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["top", "--url", "127.0.0.1:1"]) == 2
    assert "no service answers there" in capsys.readouterr().err
    assert run_command(["top", "--interval-s", "0"]) == 2
    assert "--interval-s: got 0.0, expected a number in [0.1, 3600]" in capsys.readouterr().err
