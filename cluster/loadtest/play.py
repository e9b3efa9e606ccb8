"""Sends a load to a target, open loop: every request when it is due, whatever became of those before it.

An answer that comes late therefore never delays a later request, and a server that falls behind is seen to. What the
generator itself is late by is in every record.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from contextlib import aclosing

from cluster.loadtest.record import Ending, Record
from cluster.loadtest.request import LoadRequest
from cluster.loadtest.target import Finished, Target, Tokens
from engine.errors import DeadlineExceeded, Overloaded, TandemError
from engine.objectives import Objectives

Clock = Callable[[], float]
# Between the start of a run and its first request, so that this one is in time too.
LEAD_S = 0.02


class Hopeless(Exception):
    """More requests have missed than the run may lose."""


async def play(
    target: Target,
    requests: Sequence[LoadRequest],
    *,
    objectives: Objectives,
    timeout_s: float,
    clock: Clock | None = None,
    on_record: Callable[[Record], None] = lambda record: None,
    misses_allowed: int | None = None,
) -> list[Record]:
    """One record per request, in the order of `requests`, which are sorted by arrival.

    `clock` is what times are read from, the loop's by default; a loop with a coarse clock (uvloop: whole milliseconds)
    wants a finer one. With `misses_allowed`, the run ends as soon as more requests than that have missed `objectives`;
    the rest is cut off and recorded as given up.
    """
    now = clock or asyncio.get_running_loop().time
    start_s = now() + LEAD_S
    records: dict[int, Record] = {}
    missed = 0

    async def follow(request: LoadRequest) -> None:
        nonlocal missed
        record = await _measure(target, request, objectives, timeout_s, start_s, now)
        records[request.index] = record
        missed += not record.is_met(objectives)
        on_record(record)
        if misses_allowed is not None and missed > misses_allowed:
            raise Hopeless

    try:
        async with asyncio.TaskGroup() as group:
            for request in requests:
                await _until(start_s + request.arrival_s, now)
                group.create_task(follow(request))
    except* Hopeless:
        pass
    return [records.get(request.index) or _given_up(request) for request in requests]


async def _until(due_s: float, now: Clock) -> None:
    # A coarse timer may fire a little early.
    while (left_s := due_s - now()) > 0:  # noqa: ASYNC110 - a time is waited for, not an event
        await asyncio.sleep(left_s)


async def _measure(
    target: Target, request: LoadRequest, objectives: Objectives, timeout_s: float, start_s: float, now: Clock
) -> Record:
    stamps_s: list[float] = []
    tokens = 0
    finished = Finished()
    ending: Ending = "answered"
    error = ""
    sent_s = now()
    try:
        async with asyncio.timeout(timeout_s), aclosing(target.stream(request, objectives, timeout_s)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Tokens):
                    stamps_s.append(now())
                    tokens += piece.count
                else:
                    finished = piece
    except (TimeoutError, DeadlineExceeded) as raised:
        ending, error = "timed_out", str(raised) or f"no end after {timeout_s:g} s"
    except Overloaded as raised:
        # With tokens out it is no reject but a broken answer.
        ending, error = "failed" if stamps_s else "rejected", str(raised)
    except TandemError as raised:
        ending, error = "failed", f"{type(raised).__name__}: {raised}"
    end_s = now() - sent_s
    if ending == "answered" and not stamps_s:
        ending, error = "failed", "an answer without tokens"
    count = finished.output_tokens or tokens
    return Record(
        request.index,
        request.arrival_s,
        sent_s - start_s - request.arrival_s,
        ending,
        end_s,
        ttft_s=stamps_s[0] - sent_s if stamps_s else None,
        tpot_s=(stamps_s[-1] - stamps_s[0]) / (count - 1) if stamps_s and count > 1 else None,
        gaps_s=tuple(after - before for before, after in itertools.pairwise(stamps_s)),
        prompt_tokens=request.prompt_tokens if finished.prompt_tokens is None else finished.prompt_tokens,
        cached_tokens=finished.cached_tokens or 0,
        output_tokens=count,
        asked_tokens=request.output_tokens,
        error=error,
        receipt=finished.receipt,
    )


def _given_up(request: LoadRequest) -> Record:
    return Record(
        request.index,
        request.arrival_s,
        0.0,
        "given_up",
        0.0,
        prompt_tokens=request.prompt_tokens,
        asked_tokens=request.output_tokens,
        error="the run was ended: too many requests had missed",
    )
