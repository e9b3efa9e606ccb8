"""Which few workers to look at: with a thousand of them, the best of a well-chosen handful is as good as the best.

The least loaded (from the view's orders), those that hold the most of the prompt, and some at random, lest all that
decide at the same time agree (power of k choices: Mitzenmacher, IEEE TPDS 2001).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import islice

from cluster.prefix_index import PrefixMatch
from cluster.routing.load_order import LoadOrder
from cluster.routing.query import Defer, Impossible, RouteQuery
from cluster.routing.view import ClusterView
from cluster.routing.worker_load import DecodeLoad, PrefillLoad

Loads = Mapping[str, PrefillLoad] | Mapping[str, DecodeLoad]


def too_large(query: RouteQuery, view: ClusterView, allow_local: bool) -> Impossible | None:
    """The answer to a request that fits none of the pools, None where one of them may take it. Its client reads
    already: then it fits none of what is left of them, and waits for those that it was let in by."""
    if query.is_resumed:
        return None
    limits = [("prompt + max_tokens", query.total_tokens, view.decode_capacities)]
    if not allow_local and not view.colocated_order:
        limits.append(("prompt", query.prompt_tokens, view.prefill_capacities))
    for field, tokens, capacities in limits:
        if capacities and tokens > (most := max(capacities)):
            return Impossible(field, f"{tokens} tokens", f"at most {most}: no worker has KV blocks for more")
    return None


def nobody(query: RouteQuery, view: ClusterView, allow_local: bool) -> Defer:
    """The answer where no route was found: there is none for anybody, or those that have room for it are not there."""
    if not (view.decode_order or view.colocated_order):
        return Defer("no decode worker is available", for_all=True)
    if not (view.prefill_order or view.colocated_order or allow_local):
        return Defer("no prefill worker is available", for_all=True)
    return Defer(f"no worker with room for {query.total_tokens} tokens is available")


def pick(
    orders: tuple[LoadOrder, ...], loads: Loads, match: PrefixMatch, tokens: int, count: int, rng: random.Random
) -> list[str]:
    """Ids of the `count` least loaded of each order, as many holders of the prompt and one at random, each once; only
    workers that can take `tokens`."""
    found: dict[str, None] = {}
    for order in orders:
        if len(order) <= 2 * count + 1:
            found.update(dict.fromkeys(order.ids))
            continue
        found.update(dict.fromkeys(order.least(count)))
        found.update((worker_id, None) for worker_id in match.holders(count) if worker_id in order)
        found[rng.choice(order.ids)] = None
    chosen = [worker_id for worker_id in found if loads[worker_id].capacity_tokens >= tokens]
    if not chosen:
        # Pools of different sizes, and none of the large ones was looked at: on from the least loaded.
        fitting = (worker_id for order in orders for worker_id in order if loads[worker_id].capacity_tokens >= tokens)
        chosen = list(islice(fitting, count))
    return chosen
