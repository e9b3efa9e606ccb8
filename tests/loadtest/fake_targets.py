"""Targets in memory: one that follows a script, and one that serves one request after another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

from cluster.loadtest.load import Load, Process
from cluster.loadtest.request import LoadRequest
from cluster.loadtest.target import Finished, TargetFacts, Tokens
from cluster.planning.trace import TraceRequest
from engine.errors import TandemError
from engine.objectives import Objectives

# What comes after a pause of so many seconds.
Script = Sequence[tuple[float, Tokens | Finished | TandemError]]


class ScriptedTarget:
    """Answers request i by `script(i)`. Remembers when each was sent, with which objectives, and which were cut off."""

    url = "fake:1"

    def __init__(
        self, script: Callable[[int], Script], name: str = "fake", *, acts_on_objectives: bool = False
    ) -> None:
        self.name, self.acts_on_objectives = name, acts_on_objectives
        self._script = script
        self.sent: list[tuple[float, LoadRequest, Objectives]] = []
        self.cut: list[int] = []

    async def facts(self) -> TargetFacts:
        return TargetFacts("fake", 1000, 4096)

    async def stream(
        self, request: LoadRequest, objectives: Objectives, timeout_s: float
    ) -> AsyncGenerator[Tokens | Finished, None]:
        self.sent.append((asyncio.get_running_loop().time(), request, objectives))
        try:
            for pause_s, piece in self._script(request.index):
                await asyncio.sleep(pause_s)
                if isinstance(piece, TandemError):
                    raise piece
                yield piece
        except (asyncio.CancelledError, GeneratorExit):
            self.cut.append(request.index)
            raise

    async def close(self) -> None:
        pass


class QueueTarget(ScriptedTarget):
    """One token per request, `service_s` each, first come first served: with evenly spaced arrivals every request is
    answered after `service_s` as long as at most 1 / service_s arrive in a second."""

    def __init__(self, service_s: float, name: str = "queue", *, acts_on_objectives: bool = False) -> None:
        super().__init__(lambda index: (), name, acts_on_objectives=acts_on_objectives)
        self._service_s = service_s
        self._one_at_a_time = asyncio.Lock()

    async def stream(
        self, request: LoadRequest, objectives: Objectives, timeout_s: float
    ) -> AsyncGenerator[Tokens | Finished, None]:
        self.sent.append((asyncio.get_running_loop().time(), request, objectives))
        async with self._one_at_a_time:
            await asyncio.sleep(self._service_s)
        yield Tokens(1)
        yield Finished(4, 0, 1)


def answer(first_s: float, gap_s: float, tokens: int) -> Script:
    """One token after `first_s`, then one every `gap_s`."""
    later = [(gap_s, Tokens(1)) for _ in range(tokens - 1)]
    return [(first_s, Tokens(1)), *later, (0.0, Finished(4, 0, tokens))]


def even_load(count: int, output_tokens: int = 4) -> Load:
    """Evenly spaced arrivals."""
    return Load((TraceRequest(None, 4, output_tokens),) * count, Process(count, "fixed"))


def at(*arrivals_s: float) -> list[LoadRequest]:
    return [LoadRequest(index, time, (1, 2, 3, 4), 4, 4) for index, time in enumerate(arrivals_s)]
