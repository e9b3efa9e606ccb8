"""The goodput policy: the way to serve a request that promises the most requests in time, or a refusal at once.

    best prospect worth nothing           ─▶ Reject, with the reason
    every queue longer than `lead_s`      ─▶ Defer: it is worth it, but nobody could start it now (late binding)
    else                                  ─▶ Route

Goodput and the two objectives are DistServe's (Zhong et al., OSDI 2024); deciding by the expected loss of others as
well makes admission and routing one decision. Requests without objectives gain by any route, so they are never refused
for objectives; they wait while serving them would cost others theirs, at most `patience_s`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

from cluster.gateway_config import RouterConfig
from cluster.prefix_index import PrefixMatch
from cluster.routing.booking import Booking
from cluster.routing.calibration import Calibration, Kind
from cluster.routing.candidates import nobody, pick, too_large
from cluster.routing.load_order import LoadOrder
from cluster.routing.prospect import Forecast, Prices, Prospect
from cluster.routing.query import Answer, Defer, Reject, RouteQuery
from cluster.routing.view import ClusterView
from cluster.routing.worker_load import DecodeLoad

# Prompts and decode workers that are paired with one another: of more, none would be the best.
PAIRED_PROMPTS = 2
PAIRED_DECODES = 2
# A pair that promises so much of a request, in an empty queue, is taken without a look at local routes.
NO_BETTER = 0.995
# Shorter answers say little about the pace of decoding.
LEAST_ANSWER = 4
# How often is looked whether there is room for one without objectives, and what is no wait worth the name.
LOOK_AGAIN_S = 0.2
LEAST_WAIT_S = 1e-3
# Who was put off for longer than this was promised an answer, and gets it late where the promise fails: a worker
# computes late prompts when it has no other, or in every so many steps.
TOLD_WITHIN_S = 0.05
# So a promise has to be more likely to be kept than not: one that fails costs a worker a prompt that helps nobody.
LEAST_PROMISE = 0.5
MIN_RETRY_S, MAX_RETRY_S = 0.1, 60.0


class GoodputRouter:
    """Implements cluster.routing.query.Router."""

    name = "goodput"
    refuses = True

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self.calibration = Calibration()
        self.prices = Prices()

    def route(self, query: RouteQuery, view: ClusterView, now: float, rng: random.Random) -> Answer:
        impossible = too_large(query, view, self._config.allow_local)
        if impossible is not None:
            return impossible
        forecast = Forecast(query, view, self.calibration, self.prices, self._config, now)
        best = self._best(forecast, query, view, now, rng)
        if best is None:
            return nobody(query, view, self._config.allow_local)
        if not query.was_deferred:
            forecast.teach_prices()
        return self._decide(best, forecast, view, now)

    def learn_ttft(self, booking: Booking, now: float) -> None:
        if booking.query.is_resumed:
            return
        if booking.route.predicted_first_s > 0:
            actual_s = now - booking.routed_s
            self.calibration.ttft[_kind(booking)].add(booking.predicted_first_s, actual_s)
        self._learn_promise(booking.query, now)

    def learn_tpot(self, booking: Booking, tpot_s: float, answer_tokens: int) -> None:
        if booking.query.is_resumed:
            return
        if booking.route.predicted_tpot_s > 0 and answer_tokens >= LEAST_ANSWER:
            self.calibration.tpot.add(booking.route.predicted_tpot_s, tpot_s)

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _decide(self, best: Prospect, forecast: Forecast, view: ClusterView, now: float) -> Answer:
        query, config = forecast.query, self._config
        if query.is_resumed:
            return best.route(query, now)
        # A worker that has the prefix is waited for in its own queue: kept back is only what nobody could start.
        is_extra = best.kind == "local" and not best.decode.report.stats.local_only and bool(view.prefill_order)
        queue_s = min(view.shortest_queue_s(now), best.prompt.queue_s)
        waits_s = 0.0 if is_extra else forecast.ahead_s + queue_s - config.lead_s
        work_s = best.prompt.work_s
        patient_until_s = query.arrived_s + config.patience_s
        latest_start_s = (query.due_s if math.isfinite(query.due_s) else patient_until_s) - work_s
        if query.has_objectives:
            is_hopeless = best.probability < config.min_probability
            if is_hopeless and query.was_deferred and now - query.arrived_s > TOLD_WITHIN_S:
                return best.route(query, now)
            is_doubtful = waits_s > LEAST_WAIT_S and best.probability < LEAST_PROMISE
            if is_hopeless or (not query.was_deferred and (is_doubtful or best.worth <= config.min_worth)):
                self._learn_promise(query, now + best.ttft_s)
                return Reject(_why(best, query, now), self._retry_after_s(best, query, now))
        elif best.worth <= config.min_worth and now < patient_until_s:
            until_s = min(patient_until_s, now + LOOK_AGAIN_S)
            return Defer("others would miss their objectives", until_s, latest_start_s, work_s)
        if waits_s > LEAST_WAIT_S:
            ttft_s = now - query.arrived_s + best.ttft_s
            return Defer("every worker has work for now", now + waits_s, latest_start_s, work_s, True, ttft_s)
        return best.route(query, now)

    def _learn_promise(self, query: RouteQuery, first_s: float) -> None:
        """One that is due at no time goes behind all that are: how long it waited says nothing of these."""
        if query.promised_s > 0 and math.isfinite(query.due_s):
            self.calibration.promise.add(query.promised_s, first_s - query.arrived_s)

    def _best(
        self, forecast: Forecast, query: RouteQuery, view: ClusterView, now: float, rng: random.Random
    ) -> Prospect | None:
        matches = {size: view.prefix_index.match(query.names, size, now) for size in view.block_sizes}
        best: Prospect | None = None
        for prospect in self._prospects(forecast, query, view, matches, now, rng):
            if best is None or prospect.score > best.score:
                best = prospect
        return best

    def _prospects(
        self,
        forecast: Forecast,
        query: RouteQuery,
        view: ClusterView,
        matches: dict[int, PrefixMatch],
        now: float,
        rng: random.Random,
    ) -> Iterator[Prospect]:
        longest = max(matches.values(), key=lambda match: len(match.levels) * match.block_size, default=PrefixMatch(1))
        count = self._config.candidates
        prefill_ids = pick((view.prefill_order,), view.prefills, longest, query.prompt_tokens, count, rng)
        decode_ids = pick((view.decode_order,), view.decodes, longest, query.total_tokens, count, rng)
        prompts = []
        for worker_id in prefill_ids:
            prefill = view.prefills[worker_id]
            prompts.append(forecast.prompt(prefill, matches[prefill.report.stats.block_size]))
        prompts.sort(key=lambda prompt: prompt.wait_s + prompt.work_s)
        self._look_ahead(forecast, query, view, min((prompt.work_s for prompt in prompts), default=0.0), now)
        decodes = [view.decodes[worker_id] for worker_id in decode_ids]
        best: Prospect | None = None
        for prompt in prompts[:PAIRED_PROMPTS]:
            pairs = [forecast.pair(prompt, decode, matches[decode.report.stats.block_size]) for decode in decodes]
            yield from pairs
            pairs.sort(key=lambda pair: pair.score, reverse=True)
            decodes = [pair.decode for pair in pairs[:PAIRED_DECODES]]
            best = pairs[0] if pairs and (best is None or pairs[0].score > best.score) else best
        for decode in self._local_decodes(query, view, longest, best, decodes, rng):
            prompt, added_s = forecast.local_prompt(decode, matches[decode.report.stats.block_size])
            yield forecast.local(prompt, added_s, decode)

    def _local_decodes(
        self,
        query: RouteQuery,
        view: ClusterView,
        match: PrefixMatch,
        pair: Prospect | None,
        decodes: list[DecodeLoad],
        rng: random.Random,
    ) -> list[DecodeLoad]:
        """Workers that may compute the prompt themselves: colocated ones, the decode workers of the best pairs, and
        those with the shortest queues of prompts. A pair that could not be better is not compared with them. Without a
        cost model nothing is known of steps that mix prompts and decode rows: then only where there is nobody else."""
        count = self._config.candidates
        orders: tuple[LoadOrder, ...] = (view.colocated_order,)
        found: dict[str, DecodeLoad] = {}
        if self._config.allow_local and (view.costs.knows_mixed_steps or pair is None):
            if pair is not None and pair.worth >= NO_BETTER and not pair.prompt.queue_s and not view.colocated_order:
                return []
            orders = (view.local_order, view.colocated_order)
            found = {decode.report.worker_id: decode for decode in decodes}
        for name in pick(orders, view.decodes, match, query.total_tokens, count, rng):
            found[name] = view.decodes[name]
        return list(found.values())

    @staticmethod
    def _look_ahead(forecast: Forecast, query: RouteQuery, view: ClusterView, work_s: float, now: float) -> None:
        if not len(view.waiting) or query.was_deferred:
            return
        servers, latest_start_s = max(1, view.computing_count), query.due_s - work_s
        forecast.ahead_s = view.waiting.ahead_s(latest_start_s) / servers
        begin_s = now + view.shortest_queue_s(now)
        forecast.room_loss = view.waiting.late_after(latest_start_s, work_s, servers, begin_s)

    @staticmethod
    def _retry_after_s(best: Prospect, query: RouteQuery, now: float) -> float:
        """When the queue will have become as short as the objective asks for; for other reasons, soon."""
        late_s = best.ttft_s - (query.due_s - now) if math.isfinite(query.due_s) else 0.0
        return round(min(max(MIN_RETRY_S, late_s, best.prompt.queue_s), MAX_RETRY_S), 1)


def _kind(booking: Booking) -> Kind:
    return "local" if booking.route.is_local else "pair"


def _why(best: Prospect, query: RouteQuery, now: float) -> str:
    ttft_s, tpot_s = query.objectives.ttft_s, query.objectives.tpot_s
    expected_ttft_s = now - query.arrived_s + best.ttft_s
    if ttft_s is not None and expected_ttft_s > ttft_s:
        return f"the first token would take about {expected_ttft_s:.2g} s, the objective is {ttft_s:g} s"
    if tpot_s is not None and best.tpot_s > tpot_s:
        return f"a token would take about {best.tpot_s * 1e3:.3g} ms, the objective is {tpot_s * 1e3:g} ms"
    if best.price > best.loss:
        return "under this load its work would keep several others from their objectives"
    return "it would make others miss their objectives"
