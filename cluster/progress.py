"""Shows what is being waited for: a spinner with a clock in a terminal, plain lines elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn


class Progress:
    """Steps one after another, written to `console`."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @asynccontextmanager
    async def step(self, text: str) -> AsyncIterator[Callable[[str], None]]:
        """Shows `text` while the context lasts, then how long it took. Yields what takes news about the step, which
        may be called from any thread."""
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        if self._console.is_terminal:
            columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
            with Bar(*columns, console=self._console, transient=True) as bar:
                task = bar.add_task(text)
                yield lambda news: bar.update(task, description=news)
        else:
            self.line(f"{text} ...")
            yield lambda news: self.line(f"  {news}")
        self.line(f"{text}: {loop.time() - start_s:.1f} s")

    def line(self, text: str) -> None:
        """One line for good, above a step that is being shown."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
