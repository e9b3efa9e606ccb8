"""Quotas: who is refused, until when, and that it is nobody else's loss."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.security import quotas as module
from cluster.security.auth_config import QuotaConfig
from cluster.security.quotas import Quotas
from engine.errors import InvalidArgument, Overloaded

NONE = QuotaConfig()


def refused(quotas: Quotas, tenant: str, prompt: int, answer: int, now: float) -> Overloaded:
    before = quotas.refused_count
    with pytest.raises(Overloaded) as caught:
        quotas.charge(tenant, prompt, answer, now)
    assert quotas.refused_count == before + 1
    return caught.value


def test_without_a_quota_everything_is_let_in() -> None:
    quotas = Quotas(NONE, {})
    for _ in range(1000):
        quotas.call("acme", 0.0)
    charges = [quotas.charge("acme", 1 << 40, 1 << 40, 0.0) for _ in range(100)]
    for charge in charges:
        charge.settle(0, 1.0)
    quotas.check_empty()


def test_calls_come_in_bursts_and_then_at_the_rate() -> None:
    quotas = Quotas(QuotaConfig(requests_per_s=2, burst=3), {})
    for _ in range(3):
        quotas.call("acme", 10.0)
    with pytest.raises(Overloaded) as caught:
        quotas.call("acme", 10.0)
    assert caught.value.reason == "over this tenant's requests_per_s"
    assert caught.value.retry_after_s == 0.5
    with pytest.raises(Overloaded):
        quotas.call("acme", 10.49)
    quotas.call("acme", 10.5)
    # Another tenant has its own.
    quotas.call("globex", 10.5)


@pytest.mark.parametrize(("rate", "burst"), [(0.1, 1), (1.0, 1), (7.9, 7)])
def test_a_burst_that_is_not_named_is_a_seconds_worth(rate: float, burst: int) -> None:
    quotas = Quotas(QuotaConfig(requests_per_s=rate), {})
    for _ in range(burst):
        quotas.call("acme", 0.0)
    with pytest.raises(Overloaded):
        quotas.call("acme", 0.0)


def test_all_requests_of_a_call_are_let_in_or_none() -> None:
    quotas = Quotas(QuotaConfig(requests_per_s=2, burst=4), {})
    quotas.call("acme", 10.0)
    quotas.further_calls("acme", 2, 10.0)
    with pytest.raises(Overloaded) as caught:
        quotas.further_calls("acme", 2, 10.0)
    # One is left of the four, and who comes again needs three.
    assert (caught.value.retry_after_s, quotas.refused_count) == (1.0, 1)
    quotas.call("acme", 11.0)
    quotas.further_calls("acme", 2, 11.0)
    with pytest.raises(InvalidArgument, match=r"prompt: got '5 prompts', expected at most 4 requests in one call"):
        quotas.further_calls("acme", 4, 100.0)
    quotas.further_calls("acme", 0, 11.0)


def test_a_request_reserves_its_longest_answer_and_gets_back_what_was_not_drawn() -> None:
    quotas = Quotas(QuotaConfig(tokens_per_minute=600), {})
    charge = quotas.charge("acme", 100, 400, 0.0)
    error = refused(quotas, "acme", 100, 100, 0.0)
    assert error.reason == "over this tenant's tokens_per_minute"
    # 100 are left, and ten a second come.
    assert error.retry_after_s == 10.0
    charge.settle(100 + 20, 0.0)
    quotas.charge("acme", 480, 0, 0.0).settle(480, 0.0)
    assert refused(quotas, "acme", 1, 0, 0.0).retry_after_s == 0.1


def test_a_request_that_no_waiting_would_let_in_is_told_so() -> None:
    quotas = Quotas(QuotaConfig(tokens_per_day=1000, tokens_per_minute=600), {})
    with pytest.raises(InvalidArgument) as caught:
        quotas.charge("acme", 100, 501, 0.0)
    assert caught.value.field == "sampling_params.max_tokens"
    assert caught.value.expected == "at most 600 with the 100 of the prompt: this tenant's tokens_per_minute"
    quotas.charge("acme", 100, 500, 0.0).settle(600, 0.0)


def test_a_days_tokens_last_a_day() -> None:
    quotas = Quotas(QuotaConfig(tokens_per_day=86_400), {})
    quotas.charge("acme", 86_400, 0, 0.0).settle(86_400, 5.0)
    error = refused(quotas, "acme", 3600, 0, 600.0)
    assert (error.reason, error.retry_after_s) == ("over this tenant's tokens_per_day", 3000.0)


def test_the_limit_that_holds_longest_is_named_and_a_refusal_takes_nothing() -> None:
    quotas = Quotas(QuotaConfig(tokens_per_minute=600, tokens_per_day=864_000, requests_per_s=0.01, burst=2), {})
    quotas.call("acme", 0.0)
    quotas.charge("acme", 600, 0, 0.0).settle(600, 0.0)
    quotas.call("acme", 1.0)
    error = refused(quotas, "acme", 100, 0, 1.0)
    assert error.reason == "over this tenant's tokens_per_minute"
    # Tokens would be there in 9 s, but coming again is a call, and the next one may come at 100 s.
    assert error.retry_after_s == 99.0
    for _ in range(50):
        refused(quotas, "acme", 100, 0, 1.0)
    quotas.charge("acme", 100, 0, 10.0).settle(100, 10.0)


def test_requests_at_once_are_bounded_and_the_wait_follows_how_long_they_take() -> None:
    quotas = Quotas(QuotaConfig(max_concurrent=2), {})
    first, second = quotas.charge("acme", 1, 1, 0.0), quotas.charge("acme", 1, 1, 0.0)
    assert refused(quotas, "acme", 1, 1, 0.0).retry_after_s == 0.5, "a guess, before any has ended"
    first.settle(2, 8.0)
    third = quotas.charge("acme", 1, 1, 8.0)
    error = refused(quotas, "acme", 1, 1, 8.0)
    assert (error.reason, error.retry_after_s) == ("over this tenant's max_concurrent", 4.0)
    for charge in (second, third):
        charge.settle(2, 9.0)
    quotas.check_empty()


def test_a_named_tenant_has_its_own_quota_in_place_of_the_others() -> None:
    quotas = Quotas(QuotaConfig(max_concurrent=1), {"acme": QuotaConfig(tokens_per_minute=10)})
    held = [quotas.charge("acme", 1, 1, 0.0) for _ in range(5)]
    assert refused(quotas, "acme", 1, 0, 0.0).reason == "over this tenant's tokens_per_minute"
    other = quotas.charge("globex", 100, 100, 0.0)
    refused(quotas, "globex", 1, 1, 0.0)
    for charge in (*held, other):
        charge.settle(0, 1.0)


def test_a_charge_is_settled_once() -> None:
    charge = Quotas(NONE, {}).charge("acme", 1, 1, 0.0)
    charge.settle(2, 0.0)
    with pytest.raises(AssertionError, match="twice"):
        charge.settle(2, 0.0)


def test_what_is_remembered_of_tenants_is_bounded_and_those_that_call_are_not_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As many as there may be really take 20 s.
    monkeypatch.setattr(module, "MAX_UNNAMED", 1 << 10)
    quotas = Quotas(QuotaConfig(requests_per_s=0.001, burst=1), {"named": QuotaConfig(requests_per_s=0.001, burst=1)})
    for tenant in ("acme", "named"):
        quotas.call(tenant, 0.0)
    held = quotas.charge("acme", 1, 1, 0.0)
    for index in range(module.MAX_UNNAMED - 1):
        quotas.call(f"t{index}", 0.0)
    with pytest.raises(Overloaded):
        quotas.call("acme", 0.0)
    for index in range(module.MAX_UNNAMED - 1):
        quotas.call(f"u{index}", 0.0)
    with pytest.raises(Overloaded):
        quotas.call("acme", 0.0)
    for index in range(module.MAX_UNNAMED):
        quotas.call(f"v{index}", 0.0)
    # Forgotten, and what it held can still be settled; the named one never is.
    quotas.call("acme", 0.0)
    held.settle(2, 0.0)
    with pytest.raises(Overloaded):
        quotas.call("named", 0.0)


def test_a_burst_needs_a_rate() -> None:
    with pytest.raises(ValidationError, match="burst goes with requests_per_s"):
        QuotaConfig(burst=3)


@given(
    st.builds(
        QuotaConfig,
        requests_per_s=st.none() | st.floats(0.01, 100),
        tokens_per_minute=st.none() | st.integers(50, 5000),
        tokens_per_day=st.none() | st.integers(50, 50_000),
    ),
    st.lists(
        st.tuples(st.sampled_from("ab"), st.floats(0, 30), st.integers(1, 30), st.integers(1, 20), st.floats(0, 1)),
        max_size=40,
    ),
)
def test_whoever_comes_back_when_told_to_is_let_in(
    quota: QuotaConfig, requests: list[tuple[str, float, int, int, float]]
) -> None:
    quotas, now = Quotas(quota, {}), 0.0
    for tenant, pause_s, prompt, answer, drawn in requests:
        now += pause_s
        try:
            quotas.call(tenant, now)
        except Overloaded as error:
            now += error.retry_after_s
            quotas.call(tenant, now)
        try:
            charge = quotas.charge(tenant, prompt, answer, now)
        except Overloaded as error:
            now += error.retry_after_s
            quotas.call(tenant, now)
            charge = quotas.charge(tenant, prompt, answer, now)
        charge.settle(prompt + int(drawn * answer), now)
    quotas.check_empty()
