"""The last minutes of a gateway, second by second: how requests ended, what waited, and which way KV went. Pure.

A second that is over does not change any more, so that whoever has read it need not read it again.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field

from cluster.endings import Ended
from cluster.messages import ClusterStatus

HISTORY_SECONDS = 900
# Over which rates of KV are taken: long enough that a pair which is used now and then does not flicker.
FLOW_SECONDS = 30
# Of workers, in one second, and in what is told of them all. Those beyond are summed up.
MAX_PAIRS = 256

Pair = tuple[str, str]
OTHER_PAIRS: Pair = ("", "")


@dataclass(slots=True)
class Second:
    """Requests that ended within it, by how they did; `met*` of those that finished, `local` of those that one worker
    had alone. `prompt_tokens` and `answer_tokens` came then, of requests under way too. What is None was not looked at.
    `kv_bytes` are of the requests that ended."""

    number: int
    finished: int = 0
    rejected: int = 0
    failed: int = 0
    expired: int = 0
    cancelled: int = 0
    invalid: int = 0
    met: int = 0
    met_ttft: int = 0
    met_tpot: int = 0
    local: int = 0
    kv_bytes: int = 0
    running: int | None = None
    waiting: int | None = None
    waiting_prefill: int | None = None
    waiting_decode: int | None = None
    prompt_tokens: int | None = None
    answer_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Flow:
    """KV from one worker to another, over the last FLOW_SECONDS. Both names are "" for all pairs that are not told
    apart."""

    prefill_worker: str
    decode_worker: str
    bytes_per_s: float


@dataclass(slots=True)
class _Tokens:
    """As of the last look."""

    prompt: int = 0
    answer: int = 0


@dataclass(slots=True)
class History:
    """Times are of one clock that never goes back. It holds 2 MiB at most: some 300 bytes a second, and for its flows
    some 200 bytes a pair of workers in each of the last seconds."""

    _seconds: deque[Second] = field(default_factory=lambda: deque(maxlen=HISTORY_SECONDS))
    _flows: deque[tuple[int, Counter[Pair]]] = field(default_factory=lambda: deque(maxlen=FLOW_SECONDS + 1))
    _tokens: _Tokens = field(default_factory=_Tokens)

    def ended(self, request: Ended) -> None:
        """Counts one request, in the second in which it ended."""
        outcome, receipt = request.outcome, request.receipt
        second = self._at(outcome.ended_s)
        setattr(second, outcome.reason, getattr(second, outcome.reason) + 1)
        second.met += outcome.met_ttft and outcome.met_tpot
        second.met_ttft += outcome.met_ttft
        second.met_tpot += outcome.met_tpot
        second.local += outcome.was_local and outcome.reason == "finished"
        if receipt is not None and receipt.kv_bytes:
            second.kv_bytes += receipt.kv_bytes
            self._flow(second.number, (receipt.prefill_worker, receipt.decode_worker), receipt.kv_bytes)

    def sample(self, status: ClusterStatus, now: float) -> None:
        """Notes what waits now, and the tokens that have come since the last look. Call about once a second."""
        second = self._at(now)
        second.running, second.waiting = status.requests_running, status.requests_waiting
        at_workers = Counter[str]()
        for worker in status.workers:
            at_workers[worker.role] += worker.waiting
        second.waiting_prefill, second.waiting_decode = at_workers["prefill"], at_workers["decode"]
        tokens = _Tokens(status.prompt_tokens, status.generation_tokens)
        second.prompt_tokens = (second.prompt_tokens or 0) + tokens.prompt - self._tokens.prompt
        second.answer_tokens = (second.answer_tokens or 0) + tokens.answer - self._tokens.answer
        self._tokens = tokens

    def since(self, number: int, now: float) -> list[Second]:
        """All seconds that are over and come after second `number`, oldest first: each follows on the one before."""
        # It may be that nothing has happened for a while.
        self._at(now)
        return [second for second in self._seconds if number < second.number < math.floor(now)]

    def flows(self, now: float) -> list[Flow]:
        """Of the FLOW_SECONDS before the present one: the MAX_PAIRS largest, in order, and then all others as one."""
        present = math.floor(now)
        totals: Counter[Pair] = Counter()
        for number, flows in self._flows:
            if present - FLOW_SECONDS <= number < present:
                totals.update(flows)
        others = totals.pop(OTHER_PAIRS, 0) + totals.total()
        largest = totals.most_common(MAX_PAIRS)
        others -= sum(count for _, count in largest)
        told = [*largest, (OTHER_PAIRS, others)] if others else largest
        return [Flow(*pair, count / FLOW_SECONDS) for pair, count in told]

    def _at(self, now: float) -> Second:
        number = math.floor(now)
        if not self._seconds:
            self._seconds.append(Second(number))
        # After a long silence only what is kept has to be filled up.
        first_missing = max(self._seconds[-1].number + 1, number - HISTORY_SECONDS + 1)
        for missing in range(first_missing, number + 1):
            self._seconds.append(Second(missing))
        return self._seconds[-1]

    def _flow(self, number: int, pair: Pair, kv_bytes: int) -> None:
        if not self._flows or self._flows[-1][0] != number:
            self._flows.append((number, Counter()))
        flows = self._flows[-1][1]
        flows[pair if pair in flows or len(flows) < MAX_PAIRS else OTHER_PAIRS] += kv_bytes
