"""The router's question and its four answers: plain values."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cluster.prefix_index import BlockNames
from engine.objectives import NO_OBJECTIVES, Objectives

if TYPE_CHECKING:
    from cluster.routing.booking import Booking
    from cluster.routing.view import ClusterView


@dataclass(frozen=True, slots=True)
class RouteQuery:
    """What is to be placed. Times are seconds of the gateway's clock.

    `total_tokens` is the most that prompt and one answer can hold together, `rows` how many answers are asked for.
    `names` are the prompt's block names, None where prefixes do not matter. With `was_deferred` the router has already
    said that it will be placed, and only goes back on that within the first moment. `promised_s`: how long
    after its arrival its first token was expected then; 0.0 where nothing was said. `is_resumed`: its client reads
    already, what was drawn so far is part of `prompt_tokens`; it is never refused or put off.
    """

    prompt_tokens: int
    total_tokens: int
    rows: int = 1
    objectives: Objectives = NO_OBJECTIVES
    arrived_s: float = 0.0
    names: BlockNames | None = None
    was_deferred: bool = False
    promised_s: float = 0.0
    is_resumed: bool = False

    @property
    def due_s(self) -> float:
        """When the first token should be there; infinite without such an objective."""
        return math.inf if self.objectives.ttft_s is None else self.arrived_s + self.objectives.ttft_s

    @property
    def has_objectives(self) -> bool:
        return self.objectives.ttft_s is not None or self.objectives.tpot_s is not None

    @property
    def answer_tokens(self) -> int:
        """The longest answer that is allowed."""
        return self.total_tokens - self.prompt_tokens


@dataclass(frozen=True, slots=True)
class Route:
    """Where to go. For a local route (prefill on the decode worker) the prefill worker's id and address are "".

    Predictions are 0.0 by a policy that makes none: `predicted_ttft_s` from arrival, `predicted_first_s` from now.
    `work_s`: what computing the uncached part of the prompt takes, `taken_s` how much of that a local prompt takes from
    the rows of its decode worker. `cached_tokens` need no computing there.
    """

    prefill_id: str
    prefill_address: str
    decode_id: str
    decode_address: str
    predicted_ttft_s: float = 0.0
    predicted_tpot_s: float = 0.0
    predicted_first_s: float = 0.0
    work_s: float = 0.0
    taken_s: float = 0.0
    cached_tokens: int = 0

    @property
    def is_local(self) -> bool:
        return not self.prefill_id

    @property
    def computing_id(self) -> str:
        """The worker that computes the prompt."""
        return self.prefill_id or self.decode_id


@dataclass(frozen=True, slots=True)
class Defer:
    """Not now. Ask again at `until_s`, or when something has changed at a worker; infinite: only then, as no worker for
    it is there. `for_all`: no other request could be started either.

    `latest_start_s` orders those that wait: when the prompt must start to be in time. `work_s` is what it will take.
    `predicted_ttft_s` as in `Route`.
    """

    reason: str
    until_s: float = math.inf
    latest_start_s: float = math.inf
    work_s: float = 0.0
    for_all: bool = False
    predicted_ttft_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Reject:
    """It is not worth starting now. It may be after `retry_after_s` seconds."""

    reason: str
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Impossible:
    """No worker could ever take it; the fields are InvalidArgument's."""

    field: str
    value: str
    expected: str


Answer = Route | Defer | Reject | Impossible


class Router(Protocol):
    """A policy. Its decisions depend on its arguments and on what it was taught, on nothing else."""

    @property
    def name(self) -> str: ...

    @property
    def refuses(self) -> bool:
        """Whether a request whose objectives are out of reach is refused."""
        ...

    def route(self, query: RouteQuery, view: ClusterView, now: float, rng: random.Random) -> Answer: ...

    def learn_ttft(self, booking: Booking, now: float) -> None:
        """A request that this policy routed has its first token."""
        ...

    def learn_tpot(self, booking: Booking, tpot_s: float, answer_tokens: int) -> None:
        """It has finished, with a mean time of `tpot_s` per token after the first."""
        ...
