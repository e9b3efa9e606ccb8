"""The five usual policies, on the same index, reports and bookings as the goodput policy. None of them refuses a
request for its objectives: queue limits do that.

A prompt goes to a prefill worker or a colocated worker, whichever the policy picks among them; to any decode worker
when there is neither. Then the policy picks the decode worker.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from cluster.gateway_config import RouterConfig
from cluster.prefix_index import PrefixMatch
from cluster.routing.booking import Booking
from cluster.routing.candidates import Loads, too_large
from cluster.routing.load_order import LoadOrder
from cluster.routing.query import Answer, Defer, Route, RouteQuery
from cluster.routing.view import ClusterView
from cluster.routing.worker_load import PrefillLoad

# Workers with the longest hits that prefix_affinity compares with the least loaded one.
HOLDERS = 4


class Baseline:
    """Implements cluster.routing.query.Router around one way to pick from a pool."""

    name = ""
    refuses = False

    def __init__(self, config: RouterConfig) -> None:
        self._config = config

    def route(self, query: RouteQuery, view: ClusterView, now: float, rng: random.Random) -> Answer:
        impossible = too_large(query, view, self._config.allow_local)
        if impossible is not None:
            return impossible
        prompts = _orders_for_prompts(view, self._config.allow_local)
        computing = self._take(prompts, query, query.prompt_tokens, view, now, rng)
        if computing is None:
            has_decode = view.decode_order or view.colocated_order
            return Defer("no prefill worker is available" if has_decode else "no decode worker is available")
        prefill = view.prefills.get(computing)
        decoding = computing
        if prefill is not None:
            picked = self._take((view.decode_order,), query, query.total_tokens, view, now, rng)
            if picked is None:
                return Defer("no decode worker is available")
            decoding = picked
        return self._route(query, view, prefill, decoding, now)

    def learn_ttft(self, booking: Booking, now: float) -> None:
        """These policies learn nothing."""

    def learn_tpot(self, booking: Booking, tpot_s: float, answer_tokens: int) -> None:
        """These policies learn nothing."""

    def pick(
        self, order: LoadOrder, loads: Loads, query: RouteQuery, view: ClusterView, now: float, rng: random.Random
    ) -> str:
        """One worker of an order that has at least one."""
        raise NotImplementedError

    def _take(
        self,
        orders: tuple[LoadOrder, ...],
        query: RouteQuery,
        tokens: int,
        view: ClusterView,
        now: float,
        rng: random.Random,
    ) -> str | None:
        """A worker from the orders, each chosen with its share of the workers; one that can take `tokens`."""
        orders = tuple(order for order in orders if order)
        if not orders:
            return None
        order = orders[0]
        if len(orders) > 1:
            order = rng.choices(orders, [len(order) for order in orders])[0]
        loads: Loads = view.prefills if order is view.prefill_order else view.decodes
        picked = self.pick(order, loads, query, view, now, rng)
        # Who decodes too holds the answer as well.
        tokens = tokens if order is view.prefill_order else query.total_tokens
        if loads[picked].capacity_tokens >= tokens:
            return picked
        fitting = [worker_id for worker_id in order.ids if loads[worker_id].capacity_tokens >= tokens]
        return rng.choice(fitting) if fitting else None

    def _route(
        self, query: RouteQuery, view: ClusterView, prefill: PrefillLoad | None, decoding: str, now: float
    ) -> Route:
        """With what the bookings need to know of its work."""
        decode = view.decodes[decoding].report
        computing = decode if prefill is None else prefill.report
        match = view.prefix_index.match(query.names, computing.stats.block_size, now)
        cached = match.hit_tokens(computing.worker_id)
        uncached = query.prompt_tokens - cached
        if prefill is None:
            taken_s = work_s = view.costs.local_s(decode.stats, uncached, cached)
            queue_s = view.decodes[decoding].backlog.wait_s(now)
            return Route(
                "", "", decoding, decode.address, predicted_first_s=queue_s + work_s, work_s=work_s, taken_s=taken_s
            )
        work_s = view.costs.prefill_s(computing.stats, uncached, cached)
        first_s = prefill.backlog.wait_s(now) + work_s
        return Route(
            computing.worker_id,
            computing.address,
            decoding,
            decode.address,
            predicted_first_s=first_s,
            work_s=work_s,
            cached_tokens=cached,
        )


class RoundRobin(Baseline):
    """Each pool's workers in turn, in order of id."""

    name = "round_robin"

    def __init__(self, config: RouterConfig) -> None:
        super().__init__(config)
        self._turns: dict[LoadOrder, int] = {}

    def pick(
        self, order: LoadOrder, loads: Loads, query: RouteQuery, view: ClusterView, now: float, rng: random.Random
    ) -> str:
        turn = self._turns.get(order, 0)
        self._turns[order] = turn + 1
        return order.ids[turn % len(order)]


class Random(Baseline):
    """Any worker."""

    name = "random"

    def pick(
        self, order: LoadOrder, loads: Loads, query: RouteQuery, view: ClusterView, now: float, rng: random.Random
    ) -> str:
        return rng.choice(order.ids)


class LeastLoaded(Baseline):
    """The first of each of the view's orders: the shortest queue of prompts, the shortest decode step."""

    name = "least_loaded"

    def pick(
        self, order: LoadOrder, loads: Loads, query: RouteQuery, view: ClusterView, now: float, rng: random.Random
    ) -> str:
        return order.least(1)[0]


class PowerOfTwo(Baseline):
    """The less loaded of two at random (Mitzenmacher, IEEE TPDS 2001)."""

    name = "power_of_two"

    def pick(
        self, order: LoadOrder, loads: Loads, query: RouteQuery, view: ClusterView, now: float, rng: random.Random
    ) -> str:
        return min((rng.choice(order.ids) for _ in range(2)), key=lambda worker_id: (order.load(worker_id), worker_id))


class PrefixAffinity(Baseline):
    """Where the least is left to do, queue and uncached prompt together, in tokens; among decode workers the one with
    the most of the prompt, while it is not busier than others (the cache-aware rules of SGLang and Dynamo)."""

    name = "prefix_affinity"

    def pick(
        self, order: LoadOrder, loads: Loads, query: RouteQuery, view: ClusterView, now: float, rng: random.Random
    ) -> str:
        least = order.least(1)[0]
        match = view.prefix_index.match(query.names, loads[least].report.stats.block_size, now)
        holders = [worker_id for worker_id in match.holders(HOLDERS) if worker_id in order]
        if order is view.decode_order:
            limit = 1.1 * order.load(least)
            near = [worker_id for worker_id in holders if order.load(worker_id) <= limit]
            return max(near, key=lambda worker_id: (match.hit_tokens(worker_id), worker_id), default=least)
        return min(
            (*holders, least), key=lambda name: (_left_tokens(loads[name].backlog.own_tokens, match, name), name)
        )


BASELINES: dict[str, Callable[[RouterConfig], Baseline]] = {
    policy.name: policy for policy in (RoundRobin, Random, LeastLoaded, PowerOfTwo, PrefixAffinity)
}


def _left_tokens(queued_tokens: int, match: PrefixMatch, worker_id: str) -> int:
    return queued_tokens - match.hit_tokens(worker_id)


def _orders_for_prompts(view: ClusterView, allow_local: bool) -> tuple[LoadOrder, ...]:
    """The pools in which prompts are computed."""
    if view.prefill_order or view.colocated_order:
        return view.prefill_order, view.colocated_order
    return (view.local_order,) if allow_local else ()
