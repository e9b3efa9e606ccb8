"""What to expect of one way to serve a request: when its first token comes, at what pace the rest, and at whose cost.

    TTFT  =  wait at the gateway  +  queue ahead  +  uncached prompt       (a pair; blocks may take longer than these)
          =  queue ahead  +  uncached prompt among decode steps            (local)
    TPOT  =  decode step with this request, at the time it joins, slowed by prompts that the worker computes itself
          +  KV that arrives only after the first token, spread over the answer

    score =  P(TTFT and TPOT in time)  −  requests that miss because of this one  −  price of its work

All terms are predictions in seconds; the probabilities come from how such predictions erred lately (calibration.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from cluster.gateway_config import RouterConfig
from cluster.prefix_index import PrefixMatch
from cluster.routing.backlog import Backlog
from cluster.routing.calibration import Calibration, Kind
from cluster.routing.price import ShadowPrice
from cluster.routing.query import Route, RouteQuery
from cluster.routing.view import ClusterView
from cluster.routing.worker_load import DecodeLoad, PrefillLoad
from engine.urgency import LATE_TURN

# Decides between prospects that are equally good: a second of a request's time, its own or another's, in requests.
LATENCY_WORTH = 1e-3
# A decode worker that computes prompts all the time still decodes.
MOST_LOCAL_SHARE = 0.9
# Of a worker's rows, so many are looked at; and an answer that is longer than expected has this part of it to come.
ROWS_LOOKED_AT = 12
LEAST_LEFT = 0.2
# What of the objectives can be promised away: this share of past requests kept to the prediction.
PROMISE = 0.8
# How full pools should be. A queue only has to keep its worker busy; a decode pool that is full is as slow as may be.
QUEUE_TARGET, STEP_TARGET = 0.5, 0.9


@dataclass(frozen=True, slots=True)
class Prompt:
    """Where a prompt is computed. `wait_s` until it starts there, `queue_s` until all is done that is there now."""

    worker_id: str
    address: str
    cached_tokens: int
    work_s: float
    wait_s: float
    queue_s: float
    loss: float


@dataclass(frozen=True, slots=True)
class Prospect:
    """One candidate, judged. Times are from now; `taken_s` is what its prompt takes from its decode worker's rows."""

    kind: Kind
    prompt: Prompt
    decode: DecodeLoad
    ttft_s: float
    tpot_s: float
    taken_s: float
    decode_work_s: float
    probability: float
    loss: float
    price: float
    latency_s: float

    @property
    def worth(self) -> float:
        """Requests in time that are gained by it."""
        return self.probability - self.loss - self.price

    @property
    def score(self) -> float:
        return self.worth - LATENCY_WORTH * self.latency_s

    def route(self, query: RouteQuery, now: float) -> Route:
        is_local = self.kind == "local"
        report = self.decode.report
        return Route(
            prefill_id="" if is_local else self.prompt.worker_id,
            prefill_address="" if is_local else self.prompt.address,
            decode_id=report.worker_id,
            decode_address=report.address,
            predicted_ttft_s=now - query.arrived_s + self.ttft_s,
            predicted_tpot_s=self.tpot_s,
            predicted_first_s=self.ttft_s,
            work_s=self.prompt.work_s,
            taken_s=self.taken_s,
            cached_tokens=self.prompt.cached_tokens,
        )


@dataclass(slots=True)
class Prices:
    """Of the time of prefill workers, of prompts on decode workers, and of decode steps."""

    prefill: ShadowPrice = field(default_factory=lambda: ShadowPrice(QUEUE_TARGET))
    local: ShadowPrice = field(default_factory=lambda: ShadowPrice(QUEUE_TARGET))
    decode: ShadowPrice = field(default_factory=lambda: ShadowPrice(STEP_TARGET))


class Forecast:
    """Judges candidates for one request at one moment. `ahead_s`: how long those take that wait at the gateway and go
    before it, spread over all workers that compute prompts; `room_loss`: how many behind it would then be late."""

    def __init__(
        self,
        query: RouteQuery,
        view: ClusterView,
        calibration: Calibration,
        prices: Prices,
        config: RouterConfig,
        now: float,
    ) -> None:
        self.query = query
        self._view = view
        self._costs = view.costs
        self._calibration = calibration
        self._prices = prices
        # What the least full workers that were looked at would be asked: by the price, (fill, work).
        self._asked: dict[ShadowPrice, tuple[float, float]] = {}
        self._config = config
        self._now = now
        self.ahead_s = 0.0
        self.room_loss = 0.0
        self._answer = view.expected_answer(query.answer_tokens)
        self._context = query.rows * (query.prompt_tokens + 0.5 * self._answer)
        objectives = query.objectives
        self._ttft_left_s = math.inf if objectives.ttft_s is None else query.due_s - now
        # The first token is not decoded: a single one has no pace.
        self._tpot_limit_s = math.inf if objectives.tpot_s is None or query.answer_tokens < 2 else objectives.tpot_s

    # ── the prompt ───────────────────────────────────────────────────────────────────────────────────────────────────

    def prompt(self, prefill: PrefillLoad, match: PrefixMatch) -> Prompt:
        """The prompt on a prefill worker."""
        report = prefill.report
        cached = match.hit_tokens(report.worker_id)
        work_s = self._costs.prefill_s(report.stats, self.query.prompt_tokens - cached, cached)
        return self._queued(prefill.backlog, report.worker_id, report.address, cached, work_s, "pair")

    def local_prompt(self, decode: DecodeLoad, match: PrefixMatch) -> tuple[Prompt, float]:
        """The prompt on a decode worker, among its decode steps; and what it adds to them."""
        report = decode.report
        stats = report.stats
        cached = match.hit_tokens(report.worker_id)
        uncached = self.query.prompt_tokens - cached
        added_s = self._costs.local_s(stats, uncached, cached)
        state = decode.state_at(self._now, self._now, self._step_s(decode), self._view.answer_tokens)
        step_s = self._costs.decode_s(stats, state.rows, state.context_tokens) if self._costs.knows_mixed_steps else 0.0
        work_s = added_s + self._costs.local_steps(uncached) * step_s
        prompt = self._queued(decode.backlog, report.worker_id, report.address, cached, work_s, "local")
        return prompt, added_s

    def _queued(self, backlog: Backlog, worker_id: str, address: str, cached: int, work_s: float, kind: Kind) -> Prompt:
        """Behind those in the queue that have less slack, before the others: some of these may then be late. Those that
        are late already give way, but for every so many steps."""
        now = self._now
        queue_s = wait_s = backlog.wait_s(now)
        latest_start_s = self.query.due_s - work_s
        loss = 0.0
        if math.isfinite(latest_start_s):
            residuals = self._calibration.ttft[kind]
            # What is not this gateway's may all be in front.
            ahead_s, late_s = max(0.0, queue_s - backlog.own_work_s), 0.0
            for other in backlog.bookings:
                if now > other.query.due_s:
                    late_s += other.work_s
                elif other.latest_start_s <= latest_start_s:
                    ahead_s += other.work_s
                else:
                    limit_s = other.query.due_s - other.routed_s
                    if math.isfinite(limit_s):
                        first_s = other.predicted_first_s
                        loss += residuals.probability(first_s, limit_s)
                        loss -= residuals.probability(first_s + work_s, limit_s)
            wait_s = min(queue_s, ahead_s + min(late_s, ahead_s / (LATE_TURN - 1)))
        return Prompt(worker_id, address, cached, work_s, wait_s, queue_s, loss)

    # ── the whole ────────────────────────────────────────────────────────────────────────────────────────────────────

    def pair(self, prompt: Prompt, decode: DecodeLoad, match: PrefixMatch) -> Prospect:
        """The prompt at a prefill worker, its KV pulled to `decode`; `match` is of the decode worker's block size."""
        ready_s = self.ahead_s + prompt.wait_s + prompt.work_s
        ttft_s = max(ready_s, self._blocks_wait_s(decode))
        return self._judge("pair", prompt, decode, ttft_s, 0.0, self._exposed_s(prompt, decode, match))

    def local(self, prompt: Prompt, added_s: float, decode: DecodeLoad) -> Prospect:
        """The prompt computed by `decode` itself."""
        wait_s = prompt.wait_s + (self.ahead_s if decode.report.stats.local_only else 0.0)
        ttft_s = max(wait_s, self._blocks_wait_s(decode)) + prompt.work_s
        return self._judge("local", prompt, decode, ttft_s, added_s, 0.0)

    def _judge(
        self, kind: Kind, prompt: Prompt, decode: DecodeLoad, ttft_s: float, added_s: float, exposed_s: float
    ) -> Prospect:
        costs, stats, answer = self._costs, decode.report.stats, self._answer
        then = self._now + ttft_s
        state = decode.state_at(then, self._now, self._step_s(decode), self._view.answer_tokens)
        slow = 1.0 / (1.0 - min(MOST_LOCAL_SHARE, decode.local_share(self._now)))
        before_s = slow * costs.decode_s(stats, state.rows, state.context_tokens)
        after_s = slow * costs.decode_s(stats, state.rows + self.query.rows, state.context_tokens + self._context)
        tpot_s = after_s + exposed_s / max(1.0, answer - 1.0)
        probability = 1.0
        if math.isfinite(self._ttft_left_s):
            is_kept = self._is_kept_back(kind, prompt, decode)
            residuals = self._calibration.promise if is_kept else self._calibration.ttft[kind]
            probability = residuals.probability(ttft_s, self._ttft_left_s)
        if math.isfinite(self._tpot_limit_s):
            probability *= self._calibration.tpot.probability(tpot_s, self._tpot_limit_s)
        decode_work_s = (after_s - before_s if state.rows else 0.0) * answer + added_s
        return Prospect(
            kind,
            prompt,
            decode,
            ttft_s,
            tpot_s,
            added_s,
            decode_work_s,
            probability,
            prompt.loss + self.room_loss + self._row_loss(decode, before_s, after_s, added_s),
            self._price(kind, prompt, ttft_s, after_s, decode_work_s, decode),
            ttft_s + exposed_s + answer * after_s + max(1.0, state.rows) * added_s,
        )

    def _is_kept_back(self, kind: Kind, prompt: Prompt, decode: DecodeLoad) -> bool:
        """Whether it will be kept at the gateway first."""
        if self.query.was_deferred or (kind == "local" and not decode.report.stats.local_only):
            return False
        return self.ahead_s + prompt.queue_s > self._config.lead_s

    def _step_s(self, decode: DecodeLoad) -> float:
        stats = decode.report.stats
        return stats.decode_step_s or self._costs.decode_s(stats, max(1, decode.row_count), decode.token_count)

    def _blocks_wait_s(self, decode: DecodeLoad) -> float:
        """Until enough blocks are free: all that is held turns over within the time of an answer."""
        step_s, answer = self._step_s(decode), self._view.answer_tokens
        free = decode.free_tokens(self._now, step_s, answer)
        missing = self.query.prompt_tokens - free
        held = decode.capacity_tokens - free
        return missing / held * answer * step_s if missing > 0 < held else 0.0

    def _exposed_s(self, prompt: Prompt, decode: DecodeLoad, match: PrefixMatch) -> float:
        """Time for the KV that cannot be sent while the prompt is computed. What the prefill worker has in its cache is
        sent while the rest is computed; what the decode worker has is never sent."""
        rate = decode.links.get(prompt.address) or self._config.default_link_bytes_per_s
        if rate is None:
            return 0.0
        tokens = self.query.prompt_tokens - match.hit_tokens(decode.report.worker_id)
        return max(0.0, self._costs.kv_bytes(tokens) / rate - prompt.work_s)

    def _row_loss(self, decode: DecodeLoad, before_s: float, after_s: float, added_s: float) -> float:
        """How many of the worker's rows will miss their TPOT that would not have without this request. What a row has
        behind it is certain; what is to come may be as far off as predictions were lately."""
        bookings = decode.sample(ROWS_LOOKED_AT)
        if not bookings:
            return 0.0
        residuals, now, loss = self._calibration.tpot, self._now, 0.0
        sure = residuals.largest
        is_held_up = decode.backlog.wait_s(now) > 0
        for booking in bookings:
            limit_s = booking.tpot_objective_s
            if limit_s == math.inf:
                continue
            answer = self._view.expected_answer(booking.query.answer_tokens)
            if booking.first_s is None:
                past_s, drawn = 0.0, 0.0
            else:
                past_s = now - booking.first_s
                drawn = booking.drawn + (0.0 if is_held_up else (now - booking.drawn_s) / before_s)
            left = max(answer - drawn, LEAST_LEFT * answer)
            allowed_s = limit_s * (drawn + left) - past_s
            with_s = left * after_s + added_s
            if with_s * sure < allowed_s:
                continue
            without = residuals.probability(left * before_s, allowed_s)
            loss += booking.query.rows * (without - residuals.probability(with_s, allowed_s))
        return loss * decode.booking_count / len(bookings)

    def _price(
        self, kind: Kind, prompt: Prompt, ttft_s: float, after_s: float, decode_work_s: float, decode: DecodeLoad
    ) -> float:
        price = 0.0
        if math.isfinite(self._ttft_left_s):
            promised_s = self._ttft_left_s / self._calibration.ttft[kind].quantile(PROMISE) - prompt.work_s
            fill = (ttft_s - prompt.work_s) / promised_s if promised_s > 0 else 1.0
            price += self._asks(self._prices.prefill if kind == "pair" else self._prices.local, fill, prompt.work_s)
        if math.isfinite(self._tpot_limit_s):
            least_s = self._costs.decode_s(decode.report.stats, 1, 1)
            promised_s = self._tpot_limit_s / self._calibration.tpot.quantile(PROMISE) - least_s
            fill = (after_s - least_s) / promised_s if promised_s > 0 else 1.0
            price += self._asks(self._prices.decode, fill, decode_work_s)
        return price

    def _asks(self, price: ShadowPrice, fill: float, work_s: float) -> float:
        self._asked[price] = min(self._asked.get(price, (fill, work_s)), (fill, work_s))
        return price.of(work_s, fill)

    def teach_prices(self) -> None:
        """Call when all candidates have been judged, once for each request."""
        for price, (fill, work_s) in self._asked.items():
            price.saw(work_s, fill, self._now)
