"""`tandem top`: the cluster as its gateway sees it, again every second.

On a terminal it takes the whole screen until q or Ctrl-C; elsewhere each status is printed below the last.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from rich.console import Console, Group
from rich.live import Live
from tandem.client import Client

from cluster.calls import service_errors
from cluster.client_access import OPEN_ACCESS, Access
from cluster.commands.keyboard import pressed
from cluster.commands.top_screen import Moment, screen
from engine.errors import TandemError

TIMEOUT_S = 10.0


async def top(
    url: str,
    *,
    access: Access = OPEN_ACCESS,
    interval_s: float = 1.0,
    is_once: bool = False,
    console: Console | None = None,
) -> None:
    """`is_once`: shows one status, with the rates of one interval. Raises what the first status fails with, and with
    `is_once` the second; later ones are waited for."""
    console = Console(highlight=False) if console is None else console
    async with access.client(url, timeout_s=TIMEOUT_S) as client:
        watch = _Watch(client, url)
        await watch.look()
        if is_once:
            await asyncio.sleep(interval_s)
            await watch.look()
            console.print(watch.screen(console))
        elif console.is_terminal:
            await _live(watch, console, interval_s)
        else:
            while True:
                await asyncio.sleep(interval_s)
                await watch.try_to_look()
                console.print(watch.screen(console))


async def _live(watch: _Watch, console: Console, interval_s: float) -> None:
    with pressed("q") as quits, Live(watch.screen(console), console=console, screen=True, auto_refresh=False) as live:
        while not quits.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await quits.wait()
            if not quits.is_set():
                await watch.try_to_look()
                live.update(watch.screen(console), refresh=True)


class _Watch:
    """The last two statuses of a service."""

    def __init__(self, client: Client, url: str) -> None:
        self._client = client
        self._url = url
        self._now: Moment | None = None
        self._before: Moment | None = None
        self._problem = ""

    async def look(self) -> None:
        async with service_errors(self._url):
            status = await self._client.status()
        self._before, self._problem = self._now, ""
        self._now = Moment(asyncio.get_running_loop().time(), status)

    async def try_to_look(self) -> None:
        """What it fails with is shown."""
        try:
            await self.look()
        except TandemError as error:
            self._problem = str(error)

    def screen(self, console: Console) -> Group:
        """Of what there is after the first look."""
        assert self._now is not None, "nothing has been seen yet"
        return screen(self._now, self._before, console.width, console.height, self._problem)
