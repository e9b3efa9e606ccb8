"""The prefill queue on paper: how long a first token takes at a rate, and which rate cannot be served in time.

DistServe (OSDI '24, section 3.1) takes a prefill worker for an M/D/1 queue: Poisson arrivals at rate R, every prompt D
seconds, one at a time. Its three formulas are one, told apart by two times: the latency of a prompt, and the interval
after which the worker takes the next one.

    no split             latency D      interval D      D + R·D² / (2(1 - R·D))
    two pipeline stages  latency D      interval D/2    D + R·D² / (4(2 - R·D))
    speed-up K by ranks  latency D/K    interval D/K    D/K + R·D² / (2K(K - R·D))

At low rates the third has the shorter first token, at high ones the second: which is why rates decide the parallelism.
Prompts of unequal length wait longer, by (1 + CV²) (Pollaczek and Khinchine); `interval_cv` is that CV. Those are means
of a queue that takes everybody. A gateway that refuses who would be late serves more in time, so what a search may
leave out follows from the queue with refusals (`rate_bound_rps`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Patience beyond so many service times changes nothing worth knowing.
LONGEST_PATIENCE = 20.0
# Steps of a service time in which the workload's distribution is followed.
WORKLOAD_STEPS = 16
# Bisections of a rate end when their bracket is this narrow, relative to the highest rate there is.
RATE_PRECISION = 1e-5


@dataclass(frozen=True, slots=True)
class PrefillQueue:
    """`replicas` equal prefill workers; arrivals are split among them at random."""

    latency_s: float
    interval_s: float
    replicas: int = 1
    interval_cv: float = 0.0

    def __post_init__(self) -> None:
        assert 0 < self.interval_s <= self.latency_s * (1 + 1e-9), "a worker takes a prompt at least once per latency"
        assert self.replicas >= 1
        assert self.interval_cv >= 0

    @property
    def capacity_rps(self) -> float:
        """Requests a second that all replicas together can just serve, waiting without end."""
        return self.replicas / self.interval_s

    def load(self, rate_rps: float) -> float:
        """Share of the time that a replica computes."""
        return rate_rps / self.capacity_rps

    def mean_ttft_s(self, rate_rps: float) -> float:
        """Mean time to first token; infinite at and beyond the capacity."""
        load = self.load(rate_rps)
        if load >= 1:
            return math.inf
        waiting_s = load * self.interval_s * (1 + self.interval_cv**2) / (2 * (1 - load))
        return self.latency_s + waiting_s

    def pooled_mean_ttft_s(self, rate_rps: float) -> float:
        """What no way of sharing the arrivals among the replicas can beat; for one replica the same as `mean_ttft_s`.

        Brumelle's lower bound (1971) of one queue before all replicas: the waiting time for a worker as fast as all of
        them together, less what that one gains by never leaving a replica idle.
        """
        load = self.load(rate_rps)
        if load >= 1:
            return math.inf
        variation_s = self.interval_s * (1 + self.interval_cv**2)
        fast_s = load * variation_s / (2 * self.replicas * (1 - load))
        return self.latency_s + max(0.0, fast_s - (self.replicas - 1) * variation_s / (2 * self.replicas))

    def ttft_quantile_s(self, rate_rps: float, quantile: float) -> float:
        """A time that at least `quantile` of the first tokens keep, for prompts of equal length.

        Lundberg's bound on the waiting time W of an M/D/1 queue: P(W > t) <= exp(-θt), where θ > 0 solves
        λ·(exp(θD) - 1) = θ (Kingman 1970). Infinite at and beyond the capacity.
        """
        assert 0 < quantile < 1
        if self.load(rate_rps) >= 1:
            return math.inf
        if rate_rps <= 0:
            return self.latency_s
        return self.latency_s - math.log(1 - quantile) / self._decay_rate(rate_rps)

    def highest_rate_rps(self, ttft_s: float) -> float:
        """The highest rate whose mean first token comes in time when nobody is turned away; 0.0 when one alone takes
        longer."""
        return self._bisect(self.pooled_mean_ttft_s, ttft_s)

    def admitted_share(self, rate_rps: float, ttft_s: float) -> float:
        """Share of first tokens that come within `ttft_s` when those that could not are turned away at once.

        One queue before all replicas, equal prompts, everyone admitted whose waiting time stays within the patience
        b = ttft - latency. For M/D/1 that is exact: workload below b is distributed as without the limit, but for its
        scale, so the share is F(b) / (1 + load·F(b)), with F' = rate·(F(x) - F(x - D)) and F = exp(rate·x) below D
        (Boots and Tijms 1999, for M/G/1). Several replicas count as one of their speed, with the patience that
        `pooled_mean_ttft_s` grants: more than any of them has.
        """
        patience_s = ttft_s - self.latency_s
        if patience_s < 0:
            return 0.0
        load, service_s = self.load(rate_rps), self.interval_s / self.replicas
        patience_s += (self.replicas - 1) * service_s
        grown = _workload_growth(load, min(patience_s / service_s, LONGEST_PATIENCE))
        return grown / (1 + load * grown)

    def highest_admitted_rps(self, ttft_s: float, share: float) -> float:
        """The highest rate at which `share` of requests can have their first token in time, whoever is turned away."""
        return self._bisect(lambda rate_rps: -self.admitted_share(rate_rps, ttft_s), -share, 2 / share)

    def _bisect(self, rising: Callable[[float], float], limit: float, most_load: float = 1.0) -> float:
        """Of what rises with the rate: the rate where it reaches `limit`."""
        if rising(0.0) > limit:
            return 0.0
        low, high = 0.0, most_load * self.capacity_rps
        while high - low > RATE_PRECISION * self.capacity_rps:
            middle = (low + high) / 2
            low, high = (middle, high) if rising(middle) <= limit else (low, middle)
        return low

    def _decay_rate(self, rate_rps: float) -> float:
        """θ of the waiting time's tail, by bisection in x = θD: load·(exp(x) - 1) = x has one root above 0."""
        load = self.load(rate_rps)
        # At -log(load) the left side is still the smaller one, at -2·log(load) + 2 it no longer is.
        low, high = -math.log(load), 2 - 2 * math.log(load)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if load * math.expm1(middle) < middle else (low, middle)
        return low / self.interval_s


def unsplit(prompt_s: float, replicas: int = 1) -> PrefillQueue:
    """One worker of one stage: DistServe's equation 1."""
    return PrefillQueue(prompt_s, prompt_s, replicas)


def pipelined(prompt_s: float, stages: int = 2, replicas: int = 1) -> PrefillQueue:
    """`stages` equal stages that each hold another prompt (inter-operator): equation 2 for two of them."""
    return PrefillQueue(prompt_s, prompt_s / stages, replicas)


def sped_up(prompt_s: float, speed_up: float, replicas: int = 1) -> PrefillQueue:
    """Ranks that share every prompt (intra-operator), `speed_up` times as fast as one: equation 3."""
    return PrefillQueue(prompt_s / speed_up, prompt_s / speed_up, replicas)


def _workload_growth(load: float, patience: float) -> float:
    """F at `patience` service times: F(x) = exp(load·x) below 1, then F' = load·(F(x) - F(x - 1)).

    Followed in steps with the trapezoid rule: F never falls, where its closed form is a sum of huge terms that cancel.
    """
    step = 1 / WORKLOAD_STEPS
    count = math.ceil(patience * WORKLOAD_STEPS)
    values = [math.exp(load * index * step) for index in range(min(count, WORKLOAD_STEPS) + 1)]
    for index in range(len(values), count + 1):
        lost = (values[index - WORKLOAD_STEPS] + values[index - 1 - WORKLOAD_STEPS]) / 2
        values.append((values[-1] * (1 + load * step / 2) - load * step * lost) / (1 - load * step / 2))
    return values[-1]


def shortest_prompts(
    latencies_s: Sequence[float], intervals_s: Sequence[float], replicas: int, ttft_s: float, attainment: float
) -> PrefillQueue | None:
    """The queue of those prompts that are served at all, at best: `attainment` of them, the shortest. None when too
    many prompts alone take longer than `ttft_s`.

    `latencies_s[i]` is prompt i alone on a worker, `intervals_s[i]` how long it keeps the worker from others at best.
    """
    in_time = sorted(pair for pair in zip(intervals_s, latencies_s, strict=True) if pair[1] <= ttft_s)
    count = max(1, math.ceil(attainment * len(latencies_s) - 1e-9))
    if len(in_time) < count:
        return None
    kept = in_time[:count]
    interval_s = sum(pair[0] for pair in kept) / len(kept)
    latency_s = sum(pair[1] for pair in kept) / len(kept)
    return PrefillQueue(latency_s, min(interval_s, latency_s), replicas)


def rate_bound_rps(
    latencies_s: Sequence[float], intervals_s: Sequence[float], replicas: int, ttft_s: float, attainment: float
) -> float:
    """A rate that no scheduler goes beyond while `attainment` of requests keep `ttft_s`: not even one for which it is
    both the longest prompts that miss, and those that come when the queue is long. 0.0: it cannot be attained."""
    queue = shortest_prompts(latencies_s, intervals_s, replicas, ttft_s, attainment)
    return 0.0 if queue is None else queue.highest_admitted_rps(ttft_s, attainment)
