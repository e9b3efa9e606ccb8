"""The five usual policies, on the same index, reports and bookings as the goodput policy. None of them refuses a
request for its objectives: queue limits do that.

A prompt goes to a prefill worker or a colocated worker, whichever the policy picks among them, and then to a decode
worker that it picks. Where these are not there, or have no room for the request, any decode worker gets it whole.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from cluster.gateway_config import RouterConfig
from cluster.prefix_index import PrefixMatch
from cluster.routing.booking import Booking
from cluster.routing.candidates import Loads, nobody, too_large
from cluster.routing.load_order import LoadOrder
from cluster.routing.query import Answer, Route, RouteQuery
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
        computing = self._take((view.prefill_order, view.colocated_order), query, view, now, rng)
        prefill = None if computing is None else view.prefills.get(computing)
        decoding = computing if prefill is None else self._take((view.decode_order,), query, view, now, rng)
        if decoding is None:
            prefill = None
            alone = view.local_order if self._config.allow_local else view.colocated_order
            decoding = self._take((alone,), query, view, now, rng)
        if decoding is None:
            return nobody(query, view, self._config.allow_local)
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
        self, orders: tuple[LoadOrder, ...], query: RouteQuery, view: ClusterView, now: float, rng: random.Random
    ) -> str | None:
        """A worker from the orders, each chosen with its share of the workers; one that has room for the request."""
        orders = tuple(order for order in orders if order)
        if not orders:
            return None
        order = orders[0]
        if len(orders) > 1:
            order = rng.choices(orders, [len(order) for order in orders])[0]
        loads: Loads = view.prefills if order is view.prefill_order else view.decodes
        picked = self.pick(order, loads, query, view, now, rng)
        if _has_room(picked, query, view):
            return picked
        fitting = [worker_id for order in orders for worker_id in order.ids if _has_room(worker_id, query, view)]
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


def _has_room(worker_id: str, query: RouteQuery, view: ClusterView) -> bool:
    prefill = view.prefills.get(worker_id)
    if prefill is not None:
        return prefill.capacity_tokens >= query.prompt_tokens
    # Who decodes holds the answer as well.
    return view.decodes[worker_id].capacity_tokens >= query.total_tokens
