"""How much each tenant may ask for, and who is refused for having asked for more. Pure.

    call()    one call of any method, before its request is read; further_calls() when it holds several
    charge()  a request: its prompt, the most that it may draw, a place among those at once ─▶ Charge
    settle()  it is over: what was reserved and not used is given back

A refusal takes nothing, and says when the same would be accepted if the tenant asked for nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from cluster.security.auth_config import QuotaConfig
from cluster.security.token_bucket import ROUNDING_S, TokenBucket
from engine.errors import InvalidArgument, Overloaded
from engine.running_average import RunningAverage

MINUTE_S, DAY_S = 60.0, 86400.0
# Tenants that the configuration does not name, of whom anything is remembered. One that is forgotten for it, the one
# that asked longest ago, begins with full buckets.
MAX_UNNAMED = 1 << 17
# Of a bucket, for an answer that may be as long as there is room.
FILL_SHARE = 0.25
MIN_RETRY_S, MAX_RETRY_S = 0.1, 60.0
# Before the first request has ended, nothing is known of how long one takes.
FIRST_GUESS_S = 1.0


class Charge:
    """What one request holds of its tenant's quota, until it is settled."""

    def __init__(self, usage: _Usage, tokens: int, now: float) -> None:
        self._usage = usage
        self._tokens = tokens
        self._since_s = now
        usage.running += 1
        for bucket in usage.buckets.values():
            bucket.take(tokens, now)

    def settle(self, used_tokens: int, now: float) -> None:
        """`used_tokens` of the prompt and the answer were used. To be called once."""
        usage = self._usage
        assert usage.running > 0, "a charge was settled twice"
        usage.running -= 1
        usage.took_s.add(now - self._since_s)
        for bucket in usage.buckets.values():
            bucket.give_back(max(0, self._tokens - used_tokens))


class Quotas:
    """Of each tenant in `named` its own quota; of every other one, each for itself, `default`."""

    def __init__(self, default: QuotaConfig, named: Mapping[str, QuotaConfig]) -> None:
        self._default = default
        self._named = {tenant: _Usage(quota) for tenant, quota in named.items()}
        # In order of their last calls.
        self._unnamed: dict[str, _Usage] = {}
        self.refused_count = 0

    def call(self, tenant: str, now: float) -> None:
        """Counts a call. Raises Overloaded."""
        calls = self._usage(tenant).calls
        if calls is None:
            return
        if wait_s := calls.wait_s(1, now):
            raise self._refusal("requests_per_s", wait_s)
        calls.take(1, now)

    def further_calls(self, tenant: str, count: int, now: float) -> None:
        """Counts all that one call asks for beyond its first request, or nothing of it. Raises Overloaded;
        InvalidArgument for more than the tenant may ask for at once."""
        calls = self._usage(tenant).calls
        if calls is None or not count:
            return
        if count + 1 > calls.size:
            limit = f"at most {calls.size:g} requests in one call: this tenant's requests_per_s"
            raise InvalidArgument("prompt", f"{count + 1} prompts", limit)
        if calls.wait_s(count, now):
            # Who comes again calls again.
            raise self._refusal("requests_per_s", calls.wait_s(count + 1, now))
        calls.take(count, now)

    def charge(self, tenant: str, prompt_tokens: int, max_tokens: int, now: float) -> Charge:
        """Charges a request for its prompt, and reserves `max_tokens`, all of its choices' together. Raises Overloaded;
        InvalidArgument for one that no waiting would make acceptable."""
        usage = self._usage(tenant)
        tokens = prompt_tokens + max_tokens
        for name, bucket in usage.buckets.items():
            if tokens > bucket.size:
                limit = f"at most {bucket.size:g} with the {prompt_tokens} of the prompt: this tenant's {name}"
                raise InvalidArgument("sampling_params.max_tokens", max_tokens, limit)
        waits_s = {name: bucket.wait_s(tokens, now) for name, bucket in usage.buckets.items()}
        if usage.is_crowded:
            waits_s["max_concurrent"] = usage.turn_s
        longest = max(waits_s, key=waits_s.__getitem__, default="")
        if longest and waits_s[longest] > 0:
            # Who comes again calls again.
            call_s = usage.calls.wait_s(1, now) if usage.calls is not None else 0.0
            raise self._refusal(longest, max(waits_s[longest], call_s))
        return Charge(usage, tokens, now)

    def fill_tokens(self, tenant: str, prompt_tokens: int) -> float:
        """The most that a request which names no length may reserve for its answer: a part of what its prompt leaves of
        the smallest bucket, or each such request would keep all others of its tenant waiting. Infinite without one."""
        sizes = [bucket.size for bucket in self._usage(tenant).buckets.values()]
        return (min(sizes, default=math.inf) - prompt_tokens) * FILL_SHARE

    def check_empty(self) -> None:
        """Asserts that no request holds anything."""
        held = [usage.running for usage in self._all() if usage.running]
        assert not held, f"{sum(held)} requests still hold their tenants' quotas"

    def _all(self) -> Iterator[_Usage]:
        yield from self._named.values()
        yield from self._unnamed.values()

    def _usage(self, tenant: str) -> _Usage:
        if tenant in self._named:
            return self._named[tenant]
        usage = self._unnamed.pop(tenant, None) or _Usage(self._default)
        self._unnamed[tenant] = usage
        if len(self._unnamed) > MAX_UNNAMED:
            del self._unnamed[next(iter(self._unnamed))]
        return usage

    def _refusal(self, limit: str, wait_s: float) -> Overloaded:
        self.refused_count += 1
        # Up to whole milliseconds, but for what rounding makes of nothing: who comes then is not too early.
        return Overloaded(f"over this tenant's {limit}", math.ceil((wait_s - ROUNDING_S / 2) * 1e3) / 1e3)


class _Usage:
    """What one tenant has used lately."""

    __slots__ = ("_quota", "buckets", "calls", "running", "took_s")

    def __init__(self, quota: QuotaConfig) -> None:
        self._quota = quota
        self.calls: TokenBucket | None = None
        if quota.requests_per_s is not None:
            burst = quota.burst or max(1, math.floor(quota.requests_per_s))
            self.calls = TokenBucket(burst, quota.requests_per_s)
        sizes = {
            "tokens_per_minute": (quota.tokens_per_minute, MINUTE_S),
            "tokens_per_day": (quota.tokens_per_day, DAY_S),
        }
        self.buckets = {
            name: TokenBucket(size, size / period_s) for name, (size, period_s) in sizes.items() if size is not None
        }
        self.running = 0
        self.took_s = RunningAverage()

    @property
    def is_crowded(self) -> bool:
        return self._quota.max_concurrent is not None and self.running >= self._quota.max_concurrent

    @property
    def turn_s(self) -> float:
        """About how long until one of those that run is over, at the pace of the last ones."""
        took_s = self.took_s.value or FIRST_GUESS_S
        return min(max(MIN_RETRY_S, took_s / (self._quota.max_concurrent or 1)), MAX_RETRY_S)
