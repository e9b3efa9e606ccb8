"""Tenants of one gateway: what each may ask for, and that none learns of another."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.gateway import Gateway
from cluster.gateway_config import GatewayConfig
from cluster.messages import Complete
from cluster.prefix_index import BlockNames
from cluster.registry import KVEvents
from cluster.security.auth_config import AuthConfig, QuotaConfig
from cluster.security.tenant_salts import TenantSalts
from engine.errors import DeadlineExceeded, InvalidArgument, Overloaded, Unavailable
from engine.sampling import SamplingParams
from tests.cluster.fake_decode import STEP_S, FakeDecode, on_virtual_time
from tests.cluster.serving import (
    ANSWER,
    CONFIG,
    LENGTH,
    MODEL,
    REQUEST,
    STATS,
    TO_THE_END,
    TOKENIZER,
    collect,
    report,
    serving,
    start,
)

PROMPT_TOKENS = len(TOKENIZER.encode("hello"))
SALTS = TenantSalts(bytes(32))
LONG = replace(TO_THE_END, prompt=tuple(range(1, 100)))


def with_quota(**limits: object) -> GatewayConfig:
    """acme has the limits, everybody else has none."""
    quota = QuotaConfig(**limits)  # type: ignore[arg-type]
    return CONFIG.model_copy(update={"tenants": {"acme": quota}, "auth": AuthConfig(keys_file=Path("keys"))})


async def now() -> float:
    return asyncio.get_running_loop().time()


async def refused(gateway: Gateway, **changes: object) -> Overloaded:
    with pytest.raises(Overloaded) as caught:
        await collect(gateway, replace(REQUEST, tenant="acme", **changes))
    return caught.value


# ── quotas ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@on_virtual_time
async def test_what_was_not_drawn_is_given_back_and_the_wait_is_right() -> None:
    size = PROMPT_TOKENS + 40
    async with serving(FakeDecode([*ANSWER, 0], eos=0), config=with_quota(tokens_per_minute=size)) as gateway:
        began_s = await now()
        await collect(gateway, replace(REQUEST, tenant="acme"))
        ended_s = await now()
        error = await refused(gateway)
        # What was used comes back at an even pace, from the moment when it was reserved.
        used = PROMPT_TOKENS + LENGTH + 1
        due_s = began_s + used * 60 / size
        assert ended_s + error.retry_after_s == pytest.approx(due_s, abs=2e-3)
        assert error.reason == "over this tenant's tokens_per_minute"
        await collect(gateway, replace(REQUEST, tenant="globex"))
        await asyncio.sleep(ended_s + error.retry_after_s - await now())
        await collect(gateway, replace(REQUEST, tenant="acme"))


@on_virtual_time
async def test_several_choices_are_charged_each() -> None:
    config = with_quota(tokens_per_minute=PROMPT_TOKENS + 3 * LENGTH)
    async with serving(FakeDecode(ANSWER), config=config) as gateway:
        four = SamplingParams(max_tokens=LENGTH, n=4)
        with pytest.raises(
            InvalidArgument, match=r"^sampling_params.max_tokens: got .* this tenant's tokens_per_minute"
        ):
            await collect(gateway, replace(REQUEST, params=four, tenant="acme"))
        await collect(gateway, replace(REQUEST, params=replace(four, n=3), tenant="acme"))
        await refused(gateway, params=SamplingParams(max_tokens=1))


@on_virtual_time
async def test_a_request_that_no_worker_had_costs_nothing() -> None:
    size = PROMPT_TOKENS + 40
    async with serving(FakeDecode(ANSWER), workers=(), config=with_quota(tokens_per_minute=size)) as gateway:
        for _ in range(3):
            with pytest.raises(Unavailable):
                await collect(gateway, replace(REQUEST, tenant="acme"))
        gateway.heartbeat(report("d"))
        await collect(gateway, replace(TO_THE_END, tenant="acme"))


@on_virtual_time
async def test_a_request_that_its_client_leaves_costs_its_prompt_and_what_was_drawn() -> None:
    size = 1000
    async with serving(FakeDecode(ANSWER * 10), config=with_quota(tokens_per_minute=size)) as gateway:
        request = replace(LONG, params=SamplingParams(max_tokens=500), tenant="acme")
        async with aclosing(gateway.generate(request)) as parts:
            await anext(parts)
        left = size - len(LONG.prompt) - 1
        await refused(gateway, prompt=LONG.prompt, params=SamplingParams(max_tokens=left - len(LONG.prompt) + 30))
        charge = gateway.quotas.charge("acme", left, 0, await now())
        charge.settle(0, await now())


@on_virtual_time
async def test_what_was_drawn_and_not_read_costs_as_much() -> None:
    size = 1000
    async with serving(FakeDecode(ANSWER * 100), config=with_quota(tokens_per_day=size)) as gateway:
        request = replace(LONG, params=SamplingParams(max_tokens=500), tenant="acme")
        async with aclosing(gateway.generate(request)) as parts:
            await anext(parts)
            await asyncio.sleep(600 * STEP_S)
        left = size - len(LONG.prompt) - 500
        with pytest.raises(Overloaded):
            gateway.quotas.charge("acme", left, 10, await now())
        gateway.quotas.charge("acme", left, 0, await now()).settle(0, await now())


@on_virtual_time
async def test_what_is_drawn_after_a_stop_string_costs_nothing() -> None:
    async with serving(FakeDecode(ANSWER * 100), config=with_quota(tokens_per_day=1000)) as gateway:
        params = SamplingParams(max_tokens=500, stop=(",",))
        async with aclosing(gateway.generate(replace(LONG, params=params, tenant="acme"))) as parts:
            await anext(parts)
            await asyncio.sleep(600 * STEP_S)
            *_, complete = [part async for part in parts]
        assert isinstance(complete, Complete)
        left = 1000 - len(LONG.prompt) - complete.usage.completion_tokens
        gateway.quotas.charge("acme", left, 0, await now()).settle(0, await now())


@on_virtual_time
async def test_answers_without_a_length_are_as_long_as_the_quota_allows_and_keep_no_other_waiting() -> None:
    fake, size = FakeDecode([*ANSWER, 0], eos=0), PROMPT_TOKENS + 400
    config = with_quota(tokens_per_minute=size, tokens_per_day=10 * size)
    async with serving(fake, config=config.model_copy(update={"max_running": 4})) as gateway:
        two = replace(REQUEST.params, n=2)
        tasks = [start(gateway, f"r{number}", tenant="acme", fills_context=True) for number in range(2)]
        tasks.append(start(gateway, "two", tenant="acme", fills_context=True, params=two))
        await asyncio.gather(*tasks, start(gateway, "other", tenant="globex", fills_context=True))
        lengths = [submit.params.max_tokens for _, submit in fake.submits]
        assert lengths == [100, 100, 50, min(MODEL.max_context, 16 * STATS.blocks_total) - PROMPT_TOKENS]
        # What the client named is told as what it named.
        with pytest.raises(InvalidArgument, match="max_tokens: got 401, expected at most"):
            await collect(gateway, replace(REQUEST, params=SamplingParams(max_tokens=401), tenant="acme"))


@on_virtual_time
async def test_requests_at_once_are_bounded_however_they_end() -> None:
    async with serving(FakeDecode(ANSWER * 100), config=with_quota(max_concurrent=2)) as gateway:
        params = SamplingParams(max_tokens=400)
        tasks = [start(gateway, f"r{index}", tenant="acme", params=params, deadline_s=0.3) for index in range(2)]
        await asyncio.sleep(2 * STEP_S)
        error = await refused(gateway, request_id="r2")
        assert error.reason == "over this tenant's max_concurrent"
        other = start(gateway, "r0", tenant="globex", params=SamplingParams(max_tokens=1))
        tasks[0].cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(ended, asyncio.CancelledError | DeadlineExceeded)
        await other
        await collect(gateway, replace(TO_THE_END, request_id="r0", tenant="acme"))


@on_virtual_time
async def test_a_tenants_over_use_is_no_miss_of_the_cluster() -> None:
    async with serving(FakeDecode(ANSWER), config=with_quota(tokens_per_minute=PROMPT_TOKENS + LENGTH)) as gateway:
        await collect(gateway, replace(TO_THE_END, tenant="acme"))
        for _ in range(5):
            await refused(gateway, params=TO_THE_END.params)
        status = gateway.status(await now())
    assert (status.requests_over_quota, status.requests_rejected, status.requests_finished) == (5, 0, 1)
    assert (status.attainment, status.attainment_window) == (1.0, 1)


# ── nobody learns of others ──────────────────────────────────────────────────────────────────────────────────────────


@on_virtual_time
async def test_ids_are_of_a_tenant() -> None:
    async with serving(FakeDecode(ANSWER)) as gateway:
        mine = start(gateway, "r", tenant="acme", params=TO_THE_END.params)
        theirs = start(gateway, "r", tenant="globex", params=TO_THE_END.params)
        await asyncio.sleep(STEP_S)
        with pytest.raises(InvalidArgument, match="an id that no running request has"):
            await collect(gateway, replace(TO_THE_END, tenant="acme"))
        for task in (mine, theirs):
            _, complete = await task
            assert complete.choices[0].text == "One, two, three."


@on_virtual_time
async def test_the_same_salt_of_two_tenants_is_not_the_same() -> None:
    fake = FakeDecode(ANSWER)
    async with serving(fake, config=CONFIG, salts=SALTS) as gateway:
        # Another tenant's salt, as a worker has it, is worth nothing as one's own.
        stolen = SALTS.salt("acme", b"s")
        for tenant, own in (("acme", b"s"), ("acme", b"s"), ("acme", b""), ("globex", b"s"), ("globex", stolen)):
            await collect(gateway, replace(LONG, tenant=tenant, salt=own))
        with pytest.raises(InvalidArgument, match="cache_salt: got '257 bytes'"):
            await collect(gateway, replace(LONG, tenant="acme", salt=b"x" * 257))
    salts = [submit.salt for _, submit in fake.submits]
    assert salts[0] == salts[1] == stolen
    assert len(set(salts)) == 4


@on_virtual_time
async def test_the_router_sees_a_tenants_own_prefixes_and_no_others() -> None:
    fake = FakeDecode(ANSWER)
    async with serving(fake, config=CONFIG, salts=SALTS) as gateway:
        gateway.heartbeat(report("p", kv_events=KVEvents(1, is_snapshot=True, stored=(), evicted=())))
        await collect(gateway, replace(LONG, tenant="acme", salt=b"s"))
        index, at = gateway.view.prefix_index, await now()
        hits = {
            (tenant, own): index.match(BlockNames(LONG.prompt, SALTS.salt(tenant, own)), 16, at).hit_tokens("p")
            for tenant in ("acme", "globex")
            for own in (b"s", b"")
        }
        plain = index.match(BlockNames(LONG.prompt, b"s"), 16, at).hit_tokens("p")
    assert hits == {("acme", b"s"): 96, ("acme", b""): 0, ("globex", b"s"): 0, ("globex", b""): 0}
    assert plain == 0


@on_virtual_time
async def test_without_tenants_a_requests_salt_is_its_own() -> None:
    fake = FakeDecode(ANSWER)
    async with serving(fake) as gateway:
        await collect(gateway, replace(LONG, salt=b"s"))
    assert [submit.salt for _, submit in fake.submits] == [b"s"]


def test_what_a_client_said_is_not_in_reprs() -> None:
    request = replace(REQUEST, prompt="the prompt", salt=b"the salt")
    assert "the" not in repr(request)
