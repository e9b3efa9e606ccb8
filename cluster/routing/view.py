"""The cluster as the router sees it: an index over workers that every event changes by one entry.

    heartbeat              one worker's report
    route                  one booking on the worker that computes its prompt, and on the one that decodes
    first token, end       the booking moves on, and goes
    a moment without any   workers that were silent for too long leave, the oldest report first

Nothing here walks all workers, so what an event or a question costs does not grow with their number.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable

from cluster.prefix_index import PrefixIndex
from cluster.registry import WorkerReport
from cluster.routing.answer_length import AnswerLength
from cluster.routing.backlog import Backlog
from cluster.routing.booking import Booking
from cluster.routing.costs import WorkerCosts
from cluster.routing.load_order import LoadOrder
from cluster.routing.waiting_room import WaitingRoom
from cluster.routing.worker_load import DecodeLoad, PrefillLoad

# A prompt that waits weighs as much as so many rows, as in vLLM's balancing of its replicas.
WAITING_WEIGHT = 4
# Times the mean answer: where lengths are spread exponentially, one in three thousand is longer.
AMPLE_ANSWERS = 8


class ClusterView:
    """Workers by role. Those in the orders may be given work; `prefills` and `decodes` also hold draining and silent
    ones, whose bookings go on. Block sizes and capacities count all of these: who is silent may be back in a moment."""

    def __init__(
        self, costs: WorkerCosts, fresh_s: float, expire_s: float, answer_tokens: float, prefix_index: PrefixIndex
    ) -> None:
        self.costs = costs
        self.prefix_index = prefix_index
        self.waiting = WaitingRoom()
        self.prefills: dict[str, PrefillLoad] = {}
        self.decodes: dict[str, DecodeLoad] = {}
        # By when they will have computed the prompts that they have. `local_order`: all workers that decode.
        self.prefill_order = LoadOrder()
        self.local_order = LoadOrder()
        # By the length of their decode step.
        self.decode_order = LoadOrder()
        # Workers that get local routes only: by rows and waiting prompts together; by when these will be computed.
        self.colocated_order = LoadOrder()
        self.colocated_prompts = LoadOrder()
        self.prefill_capacities: Counter[int] = Counter()
        self.decode_capacities: Counter[int] = Counter()
        self.block_sizes: Counter[int] = Counter()
        self.answers = AnswerLength(answer_tokens)
        self._all_orders = (
            self.prefill_order,
            self.local_order,
            self.decode_order,
            self.colocated_order,
            self.colocated_prompts,
        )
        self._fresh_s = fresh_s
        self._expire_s = expire_s
        # When each was heard of, the longest ago first: those that are fresh, and those that were silent for longer.
        self._heard: OrderedDict[str, float] = OrderedDict()
        self._silent: OrderedDict[str, float] = OrderedDict()
        self._shunned: set[str] = set()
        # Called with the id of each worker that is forgotten.
        self.on_removed: Callable[[str], None] = lambda worker_id: None

    # ── events ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def report(self, report: WorkerReport, now: float) -> bool:
        """Takes a report that the registry has taken; False when the worker is to send all of its prefix cache."""
        worker_id = report.worker_id
        before = self._load(worker_id)
        if before is not None and _has_restarted(before.report, report):
            self.remove(worker_id)
        else:
            self._count(worker_id, -1)
        self._silent.pop(worker_id, None)
        self._heard[worker_id] = now
        self._heard.move_to_end(worker_id)
        stats = report.stats
        if report.role == "prefill":
            prefill = self.prefills.get(worker_id)
            if prefill is None:
                prefill = self.prefills[worker_id] = PrefillLoad(report, Backlog())
            prefill.report = report
            prefill.backlog.report(stats.queued_tokens, self.costs.queued_s(stats), now)
        else:
            decode = self.decodes.get(worker_id)
            if decode is None:
                decode = self.decodes[worker_id] = DecodeLoad(report)
            decode.heard(report)
            decode.backlog.report(stats.queued_tokens, self.costs.queued_s(stats), now)
        self._count(worker_id, 1)
        self._place(worker_id, eligible=not stats.draining and worker_id not in self._shunned)
        self.expire(now)
        return report.kv_events is None or self.prefix_index.apply(worker_id, report.kv_events)

    def drains(self, worker_id: str) -> None:
        """It takes nothing new, or is about to: nothing more is sent there until it says otherwise."""
        if self.knows(worker_id):
            self._place(worker_id, eligible=False)

    def shun(self, worker_id: str) -> None:
        """Nothing more is sent there until `readmit`, whatever it reports."""
        self._shunned.add(worker_id)
        self.drains(worker_id)

    def readmit(self, worker_id: str) -> None:
        self._shunned.discard(worker_id)
        load = self._load(worker_id)
        if load is not None and worker_id in self._heard:
            self._place(worker_id, eligible=not load.report.stats.draining)

    def remove(self, worker_id: str) -> None:
        """Forgets a worker. One that starts anew, or in another role, is another one."""
        self._silence(worker_id)
        self._silent.pop(worker_id, None)
        self._count(worker_id, -1)
        self.prefills.pop(worker_id, None)
        self.decodes.pop(worker_id, None)
        self.prefix_index.forget(worker_id)
        self.on_removed(worker_id)

    def expire(self, now: float) -> None:
        """Takes workers that were silent for `fresh_s` out of the orders, and forgets those silent for `expire_s`."""
        while self._heard:
            worker_id, heard_s = next(iter(self._heard.items()))
            if now - heard_s <= self._fresh_s:
                break
            self._silence(worker_id)
        while self._silent:
            worker_id, heard_s = next(iter(self._silent.items()))
            if now - heard_s <= self._expire_s:
                break
            self.remove(worker_id)

    def book(self, booking: Booking, now: float) -> None:
        route = booking.route
        prefill = self.prefills.get(route.prefill_id)
        if prefill is not None:
            prefill.backlog.book(booking, now)
            self._hope(route.prefill_id, prefill, booking, now)
            self._replace(route.prefill_id)
        decode = self.decodes.get(route.decode_id)
        if decode is not None:
            decode.book(booking, now)
            self._hope(route.decode_id, decode, booking, now)
            self._replace(route.decode_id)

    def first_token(self, booking: Booking, now: float) -> None:
        """Call once, when the request's first token is here."""
        booking.first_s = booking.drawn_s = now
        route = booking.route
        prefill = self.prefills.get(route.prefill_id)
        if prefill is not None:
            prefill.backlog.first_token(booking, now)
            self._replace(route.prefill_id)
        decode = self.decodes.get(route.decode_id)
        if decode is not None:
            decode.first_token(booking, now)
            self._replace(route.decode_id)

    def end(self, booking: Booking, now: float) -> None:
        """The request is over, however it ended."""
        route = booking.route
        prefill = self.prefills.get(route.prefill_id)
        if prefill is not None and booking.first_s is None:
            prefill.backlog.leave(booking, now)
            self._replace(route.prefill_id)
        decode = self.decodes.get(route.decode_id)
        if decode is not None:
            decode.end(booking, now)
            self._replace(route.decode_id)

    # ── questions ────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def answer_tokens(self) -> float:
        """Mean tokens of an answer."""
        return self.answers.mean

    @property
    def computing_count(self) -> int:
        """Workers that prompts are sent to."""
        return len(self.prefill_order) + len(self.colocated_order) or len(self.local_order)

    def knows(self, worker_id: str) -> bool:
        return worker_id in self.prefills or worker_id in self.decodes

    def is_alone(self, worker_id: str) -> bool:
        """Whether no other worker can be given what this one is given."""
        if not self.knows(worker_id):
            return False
        return all(len(order) == int(worker_id in order) for order, _ in self._orders(worker_id))

    def on_its_way(self, worker_id: str) -> int:
        """Requests of this gateway's that the worker has to compute or decode."""
        prefill, decode = self.prefills.get(worker_id), self.decodes.get(worker_id)
        return (len(prefill.backlog.bookings) if prefill else 0) + (decode.booking_count if decode else 0)

    def shortest_queue_s(self, now: float) -> float:
        """Until the first worker that prompts are sent to has none left."""
        orders = [order for order in (self.prefill_order, self.colocated_prompts) if order]
        # Decode workers compute prompts where nobody else does.
        orders = orders or [order for order in (self.local_order,) if order]
        soonest_s = min((order.load(order.least(1)[0]) for order in orders), default=now)
        return max(0.0, soonest_s - now)

    def room_tokens(self, prompt_tokens: int, max_context: int) -> int:
        """What prompt and answer may have together where the request names no length: the KV blocks of the smallest of
        the workers that decode in which nearly any answer ends, or of the largest. More would leave all others out."""
        ample = min(max_context, prompt_tokens + AMPLE_ANSWERS * self.answer_tokens)
        capacities = self.decode_capacities
        tokens = min((each for each in capacities if each >= ample), default=max(capacities, default=max_context))
        return min(tokens, max_context)

    def expected_answer(self, allowed_tokens: int) -> float:
        """Tokens of an answer that may have `allowed_tokens`."""
        return max(1.0, min(self.answer_tokens, allowed_tokens))

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _load(self, worker_id: str) -> PrefillLoad | DecodeLoad | None:
        return self.prefills.get(worker_id) or self.decodes.get(worker_id)

    def _count(self, worker_id: str, change: int) -> None:
        load = self._load(worker_id)
        if load is None:
            return
        capacities = self.prefill_capacities if worker_id in self.prefills else self.decode_capacities
        for counter, value in ((capacities, load.capacity_tokens), (self.block_sizes, load.report.stats.block_size)):
            counter[value] += change
            if not counter[value]:
                del counter[value]

    def _silence(self, worker_id: str) -> None:
        heard_s = self._heard.pop(worker_id, None)
        if heard_s is not None:
            self._silent[worker_id] = heard_s
        for order in self._all_orders:
            order.discard(worker_id)

    def _place(self, worker_id: str, *, eligible: bool) -> None:
        for order, load in self._orders(worker_id):
            if eligible:
                order.put(worker_id, load)
            else:
                order.discard(worker_id)

    def _replace(self, worker_id: str) -> None:
        """Moves a worker whose load has changed."""
        for order, load in self._orders(worker_id):
            if worker_id in order:
                order.put(worker_id, load)

    def _orders(self, worker_id: str) -> list[tuple[LoadOrder, float]]:
        prefill = self.prefills.get(worker_id)
        if prefill is not None:
            return [(self.prefill_order, prefill.backlog.busy_until_s)]
        decode = self.decodes[worker_id]
        stats, rows = decode.report.stats, decode.row_count
        local = (self.local_order, decode.backlog.busy_until_s)
        if stats.local_only:
            load = rows + WAITING_WEIGHT * len(decode.backlog.bookings)
            return [local, (self.colocated_order, load), (self.colocated_prompts, decode.backlog.busy_until_s)]
        step_s = self.costs.decode_s(stats, rows, decode.token_count + 0.5 * self.answer_tokens * rows) if rows else 0.0
        return [local, (self.decode_order, step_s)]

    def _hope(self, worker_id: str, load: PrefillLoad | DecodeLoad, booking: Booking, now: float) -> None:
        """The worker will hold this prompt. Only workers that tell of their cache can be believed to."""
        names, report = booking.query.names, load.report
        if names is None or report.kv_events is None:
            return
        size = report.stats.block_size
        match = self.prefix_index.match(names, size, now)
        first_block = match.hit_tokens(worker_id) // size
        self.prefix_index.hope(worker_id, names, size, first_block, now)


def _has_restarted(before: WorkerReport, report: WorkerReport) -> bool:
    """A worker that starts anew, or that is to serve otherwise, has nothing of what it had."""
    return (
        before.incarnation != report.incarnation
        or before.role != report.role
        or before.stats.local_only != report.stats.local_only
    )
