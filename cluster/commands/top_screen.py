"""What `tandem top` shows: two statuses of a cluster, one after the other, as a screen of any width.

Rates are of what came between the two; without a first there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text
from tandem.v1.inference_pb2 import GetStatusResponse, WorkerStatus

from cluster.commands.status import cost_error, state_of, used

BAR_CHARS = 10
# What stands above the pools, and around each of them.
HEAD_ROWS = 6
POOL_ROWS = 4


@dataclass(frozen=True, slots=True)
class Moment:
    """A status and when it was had, in seconds of any clock."""

    at_s: float
    status: GetStatusResponse


@dataclass(frozen=True, slots=True)
class _Column:
    """`from_width`: on narrower terminals it is left out."""

    heading: str
    show: Callable[[WorkerStatus, Rates], str] = field(repr=False)
    from_width: int = 0


class Rates:
    """What came per second between two moments."""

    def __init__(self, now: Moment, before: Moment | None) -> None:
        self._seconds = now.at_s - before.at_s if before is not None else 0.0
        self._now = now.status
        self._before = before.status if before is not None else now.status
        # Another life of the same worker has counted from 0.
        self._workers = {(worker.worker_id, worker.incarnation): worker for worker in self._before.workers}

    @property
    def is_known(self) -> bool:
        return self._seconds > 0

    def of(self, field_name: str) -> float:
        """Of a count in the status."""
        return self._per_second(getattr(self._now, field_name) - getattr(self._before, field_name))

    def of_worker(self, worker: WorkerStatus, field_name: str) -> float:
        return self._per_second(self.grown(worker, field_name))

    def of_workers(self, field_name: str) -> float:
        return self._per_second(sum(self.grown(worker, field_name) for worker in self._now.workers))

    def grown(self, worker: WorkerStatus, field_name: str) -> int:
        before = self._workers.get((worker.worker_id, worker.incarnation))
        return 0 if before is None else getattr(worker, field_name) - getattr(before, field_name)

    def _per_second(self, count: int) -> float:
        # A gateway that started again counts from 0.
        return max(0, count) / self._seconds if self.is_known else 0.0


def screen(now: Moment, before: Moment | None, width: int, height: int = 1000, problem: str = "") -> Group:
    """At most `width` columns and, as far as one worker of each pool fits, `height` rows. `problem`: why there is
    nothing newer."""
    status, rates = now.status, Rates(now, before)
    parts: list[Text | Table] = [_line(text, width) for text in _head(status, rates)]
    if problem:
        parts.append(_line(problem, width, "red"))
    pools = [[worker for worker in status.workers if worker.role == role] for role in ("prefill", "decode")]
    rows = max(1, (height - HEAD_ROWS - 2 * POOL_ROWS) // 2)
    for role, workers in zip(("prefill", "decode"), pools, strict=True):
        parts += _pool(role, workers, rates, width, rows)
    return Group(*parts)


def _head(status: GetStatusResponse, rates: Rates) -> Iterator[str]:
    yield f"{status.model}  router {status.router}"
    yield (
        f"requests  {status.requests_running} running, {status.requests_waiting} waiting, "
        f"{_rate(rates, rates.of('requests_finished'))}/s finished, {_rate(rates, rates.of('requests_rejected'))}/s "
        f"rejected, {_rate(rates, rates.of('requests_over_quota'))}/s over quota"
    )
    yield f"objectives  {_attainment(status)}"
    yield (
        f"tokens  {_rate(rates, rates.of('prompt_tokens'))}/s of prompts, "
        f"{_rate(rates, rates.of('generation_tokens'))}/s of answers, "
        f"KV {_bytes(rates, rates.of_workers('kv_bytes'))}/s"
    )


def _attainment(status: GetStatusResponse) -> str:
    if not status.attainment_window:
        return "no request has ended lately"
    return (
        f"{status.attainment:.1%} of {status.attainment_window} met both, "
        f"{status.attainment_ttft:.1%} TTFT, {status.attainment_tpot:.1%} TPOT"
    )


def _pool(role: str, workers: list[WorkerStatus], rates: Rates, width: int, rows: int) -> list[Text | Table]:
    able = sum(worker.fresh and not worker.draining for worker in workers)
    heading = f"{role}: {len(workers)} worker" + ("s" if len(workers) != 1 else "")
    heading += f", {able} ready" if able < len(workers) else ""
    if not workers:
        return [_line(heading, width, "bold")]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    columns = [column for column in _columns(role) if column.from_width <= width]
    for index, column in enumerate(columns):
        table.add_column(column.heading, justify="right" if index else "left", no_wrap=True, overflow="ellipsis")
    for worker in workers[:rows]:
        style = "red" if not worker.fresh else "yellow" if worker.draining else ""
        # As text: a worker's name may look like markup.
        table.add_row(*(Text(column.show(worker, rates)) for column in columns), style=style)
    more = len(workers) - rows
    return [_line(heading, width, "bold"), table, *([_line(f"and {more} more", width)] if more > 0 else [])]


def _columns(role: str) -> tuple[_Column, ...]:
    speed = (
        _Column("tok/s", lambda worker, rates: _number(worker.prefill_tokens_per_s), 60)
        if role == "prefill"
        else _Column("step", lambda worker, rates: f"{worker.decode_step_s * 1e3:.1f} ms", 60)
    )
    moved = (
        _Column("orphaned", lambda worker, rates: _with_unit(_number(worker.kv_orphan_bytes), "B"), 100)
        if role == "prefill"
        else _Column("KV in", lambda worker, rates: f"{_bytes(rates, rates.of_worker(worker, 'kv_bytes'))}/s", 100)
    )
    return (
        _Column("worker", lambda worker, rates: worker.worker_id),
        _Column("state", lambda worker, rates: state_of(worker), 70),
        _Column("run", lambda worker, rates: str(worker.running)),
        _Column("wait", lambda worker, rates: str(worker.waiting)),
        _Column("queued", lambda worker, rates: _number(worker.queued_tokens), 50),
        _Column("KV", lambda worker, rates: f"{used(worker):.0%}"),
        _Column("", lambda worker, rates: _bar(used(worker)), 80),
        speed,
        _Column("hits", _hits, 90),
        moved,
        _Column("preempted", lambda worker, rates: str(worker.preemptions), 120),
        _Column("error", lambda worker, rates: cost_error(worker), 80),
        _Column("seen", lambda worker, rates: f"{worker.heartbeat_age_s:.1f} s", 60),
    )


def _line(text: str, width: int, style: str = "") -> Text:
    line = Text(text, style=style)
    line.truncate(width, overflow="ellipsis")
    return line


def _bar(share: float) -> str:
    full = round(share * BAR_CHARS)
    return "█" * full + "░" * (BAR_CHARS - full)


def _hits(worker: WorkerStatus, rates: Rates) -> str:
    """Share of the prompt tokens that its prefix cache had, since its start."""
    return f"{worker.prefix_hits / worker.prefix_queries:.0%}" if worker.prefix_queries else "-"


def _rate(rates: Rates, value: float) -> str:
    return _number(value) if rates.is_known else "-"


def _bytes(rates: Rates, value: float) -> str:
    return _with_unit(_rate(rates, value), "B")


def _with_unit(number: str, unit: str) -> str:
    return f"{number}{unit}" if number[-1].isalpha() else f"{number} {unit}"


def _number(value: float) -> str:
    """Of three digits or so: 0.5, 12, 480, 1.2 k, 3.4 M."""
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.1f}" if 0 < value < 10 else f"{value:.0f}"
