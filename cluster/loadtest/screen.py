"""What `tandem bench` shows while it runs: a bar a run in a terminal, a line a run elsewhere, nothing when quiet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cluster.loadtest.record import Record
from engine.objectives import Objectives

# Drawing takes the interpreter from the load: seldom.
REFRESH_HZ = 2


class Screen:
    """A Watch (cluster/loadtest/study.py) on `console`."""

    def __init__(self, console: Console, *, is_quiet: bool = False) -> None:
        self._console, self._is_quiet = console, is_quiet

    @contextmanager
    def run(self, title: str, count: int, objectives: Objectives) -> Iterator[Callable[[Record], None]]:
        counts: Counter[str] = Counter()

        def add(record: Record) -> None:
            counts["ended"] += 1
            counts["met"] += record.is_met(objectives)
            counts[record.ending] += 1

        if self._is_quiet or not self._console.is_terminal:
            yield add
        else:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[news]}", markup=False),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self._console, transient=True, refresh_per_second=REFRESH_HZ) as progress:
                task = progress.add_task(title, total=count, news="")

                def show(record: Record) -> None:
                    add(record)
                    progress.update(task, completed=counts["ended"], news=_news(counts))

                yield show
        self.line(f"{title}: {_news(counts)} of {count}")

    def line(self, text: str) -> None:
        if not self._is_quiet:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _news(counts: Counter[str]) -> str:
    share = counts["met"] / counts["ended"] if counts["ended"] else 0.0
    bad = [f"{counts[kind]} {kind.replace('_', ' ')}" for kind in ("rejected", "timed_out", "failed") if counts[kind]]
    return ", ".join([f"{share:.1%} met", *bad])
