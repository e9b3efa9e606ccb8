"""The gateway and its policy together: objectives, refusals, waiting, outcomes, what workers are asked."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from cluster.gateway import Gateway
from cluster.gateway_config import GatewayConfig, ObjectivesConfig, RouterConfig
from cluster.links import DecodeLinks
from cluster.registry import HeartbeatReply, KVEvents, Registry
from decode_worker.stream import Failed
from engine.errors import DeadlineExceeded, InvalidArgument, Overloaded, TransferFailed
from engine.objectives import NO_OBJECTIVES, Objectives
from engine.sampling import SamplingParams
from tests.cluster.fake_decode import STEP_S, FakeDecode, on_virtual_time
from tests.cluster.serving import ANSWER, CONFIG, LENGTH, MODEL, REQUEST, STATS, TO_THE_END, collect, report, start
from tests.planning.linear_cost import LinearCost

# 3 prompt tokens take 0.3 s, however they are cut.
SLOW = LinearCost(fixed_s=0.0, token_s=0.1, row_s=1e-3, context_s=0.0)
WIDE = CONFIG.model_copy(update={"max_running": 64, "max_waiting": 64})


class Controller:
    """Wants the roles in `wanted`, and notes what it is told."""

    def __init__(self) -> None:
        self.wanted: dict[str, str] = {}
        self.told: list[tuple[object, ...]] = []

    def wanted_role(self, worker_id: str) -> str:
        return self.wanted.get(worker_id, "")

    def arrived(self, *what: object) -> None:
        self.told.append(("arrived", *what))

    def answered(self, *what: object) -> None:
        self.told.append(("answered", *what))


@asynccontextmanager
async def routing(
    fake: FakeDecode,
    config: GatewayConfig = WIDE,
    workers: tuple[str, ...] = ("p", "d"),
    cost: LinearCost | None = SLOW,
    controller: Controller | None = None,
    **router: object,
) -> AsyncIterator[Gateway]:
    router_config = RouterConfig(**{"allow_local": False, "lead_s": 0.05, **router})
    config = config.model_copy(update={"router": router_config})
    links = DecodeLinks(fake)
    registry = Registry(config.fresh_s, config.expire_s)
    gateway = Gateway(None, MODEL, registry, links, config, random.Random(1), cost, controller)
    for name in workers:
        gateway.heartbeat(report(name))
    yield gateway
    await asyncio.sleep(5 * STEP_S)
    gateway.check_empty()
    await links.close()


def ask(ttft_s: float | None = None, tpot_s: float | None = None, **changes: object) -> dict[str, object]:
    objectives = Objectives(ttft_s, tpot_s)
    return {"prompt": (1, 2, 3), "params": TO_THE_END.params, "objectives": objectives, **changes}


@on_virtual_time
async def test_chats_without_a_length_go_to_all_decode_workers() -> None:
    async with routing(FakeDecode([*ANSWER, 0], eos=0), workers=("p",)) as gateway:
        for name, blocks in (("d1", 128), ("d2", 127)):
            gateway.heartbeat(report(name, stats=replace(STATS, blocks_total=blocks, blocks_free=blocks)))
        tasks = [start(gateway, f"r{index}", **ask(fills_context=True)) for index in range(8)]
        used = {complete.receipt.decode_worker for _, complete in await asyncio.gather(*tasks)}
        assert used == {"d1", "d2"}


# ── objectives ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_objectives_are_the_requests_own_then_its_classs_then_the_default() -> None:
    config = GatewayConfig(
        objectives=ObjectivesConfig(ttft_ms=900, tpot_ms=90),
        classes={"chat": ObjectivesConfig(ttft_ms=500), "batch": ObjectivesConfig()},
    )
    assert config.objectives_of(NO_OBJECTIVES, "") == Objectives(0.9, 0.09)
    assert config.objectives_of(NO_OBJECTIVES, "chat") == Objectives(0.5, 0.09)
    assert config.objectives_of(Objectives(tpot_s=0.01), "chat") == Objectives(0.5, 0.01)
    with pytest.raises(InvalidArgument, match="slo_class: got 'chta', expected one of the gateway's classes: batch, "):
        config.objectives_of(NO_OBJECTIVES, "chta")
    with pytest.raises(InvalidArgument, match="none is configured"):
        GatewayConfig().objectives_of(NO_OBJECTIVES, "chat")
    with pytest.raises(InvalidArgument, match=r"objectives\.ttft_ms: got -1000"):
        config.objectives_of(Objectives(ttft_s=-1.0), "chat")


@on_virtual_time
async def test_workers_are_told_when_the_first_token_is_due_and_the_receipt_what_was_expected() -> None:
    fake = FakeDecode(ANSWER)
    config = WIDE.model_copy(update={"classes": {"chat": ObjectivesConfig(tpot_ms=50)}})
    async with routing(fake, config) as gateway:
        _, complete = await start(gateway, "r", **ask(ttft_s=2.0, slo_class="chat"))
    [(_, submit)] = fake.submits
    assert (submit.ttft_due_s, submit.tpot_s) == (2.0, 0.05)
    assert complete.receipt.predicted_ttft_s == pytest.approx(0.3)
    assert complete.receipt.predicted_tpot_s == pytest.approx(1e-3)
    plain = FakeDecode(ANSWER)
    async with routing(plain) as gateway:
        await start(gateway, "r", **ask())
    assert (plain.submits[0][1].ttft_due_s, plain.submits[0][1].tpot_s) == (None, None)


# ── refusals and waiting ─────────────────────────────────────────────────────────────────────────────────────────────


@on_virtual_time
async def test_a_request_whose_objective_is_out_of_reach_is_refused_at_once() -> None:
    async with routing(FakeDecode(ANSWER)) as gateway:
        with pytest.raises(Overloaded, match=r"the first token would take about 0.3 s, the objective is 0.1 s; retry"):
            await start(gateway, "r", **ask(ttft_s=0.1))
        assert asyncio.get_running_loop().time() == 0.0
        await start(gateway, "r", **ask(ttft_s=1.0))


@on_virtual_time
async def test_a_deferred_request_goes_on_when_the_worker_before_it_is_free() -> None:
    fake = FakeDecode(ANSWER)
    async with routing(fake) as gateway:
        gateway.heartbeat(report("p", stats=replace(STATS, queued_tokens=10, queued_s=1.0)))
        task = start(gateway, "r", **ask(ttft_s=5.0))
        await asyncio.sleep(0.9)
        assert fake.submits == []
        status = gateway.status(asyncio.get_running_loop().time())
        assert (status.requests_running, status.requests_waiting) == (1, 0)
        _, complete = await task
        # The worker was to be free at 1.0, and is sent to 0.05 s ahead.
        assert complete.receipt.gateway_queue_s == pytest.approx(0.95)


@on_virtual_time
async def test_a_first_token_is_news_for_those_that_wait() -> None:
    fake = FakeDecode(ANSWER)
    async with routing(fake) as gateway:
        first = start(gateway, "a", **ask(ttft_s=5.0, prompt=(1,) * 20))
        await asyncio.sleep(0)
        second = start(gateway, "b", **ask(ttft_s=5.0))
        await asyncio.sleep(1.5 * STEP_S)
        assert len(fake.submits) == 1
        await asyncio.sleep(STEP_S)
        # 2 s of work were booked, and its first token came after 21 ms.
        assert len(fake.submits) == 2
        await asyncio.gather(first, second)


@on_virtual_time
async def test_those_with_less_slack_leave_first() -> None:
    fake = FakeDecode(ANSWER)
    async with routing(fake, min_worth=-99.0) as gateway:
        gateway.heartbeat(report("p", stats=replace(STATS, queued_tokens=10, queued_s=1.0)))
        tasks = [start(gateway, name, **ask(ttft_s=ttft_s)) for name, ttft_s in (("lax", 9.0), ("soon", 3.0))]
        await asyncio.gather(*tasks)
    assert [submit.request_id.split("#")[0] for _, submit in fake.submits] == ["soon", "lax"]


@on_virtual_time
async def test_a_deferred_request_goes_to_a_worker_the_moment_that_its_objective_is_out_of_reach() -> None:
    fake = FakeDecode(ANSWER)
    async with routing(fake) as gateway:
        gateway.heartbeat(report("p", stats=replace(STATS, queued_tokens=10, queued_s=1.0)))
        task = start(gateway, "r", **ask(ttft_s=2.0))
        await asyncio.sleep(0.5)
        gateway.heartbeat(report("p", stats=replace(STATS, queued_tokens=100, queued_s=10.0)))
        await asyncio.sleep(0)
        assert not fake.submits
        await task
        # The worker is not free before 10.5, and is sent the prompt long before.
        assert asyncio.get_running_loop().time() <= 1.75


@on_virtual_time
async def test_a_request_that_waits_for_a_place_is_refused_when_its_objective_has_passed() -> None:
    config = WIDE.model_copy(update={"max_running": 1})
    async with routing(FakeDecode(), config) as gateway:
        first = start(gateway, "a", **ask())
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="the objective for the first token passed in the gateway's queue"):
            await start(gateway, "b", **ask(ttft_s=0.7))
        assert asyncio.get_running_loop().time() == 0.7
        with pytest.raises(DeadlineExceeded, match="gateway queue"):
            await start(gateway, "c", **ask(ttft_s=0.7, deadline_s=0.5))
        first.cancel()
        await asyncio.wait([first])


@on_virtual_time
async def test_baselines_take_what_comes() -> None:
    for policy in ("round_robin", "random", "least_loaded", "power_of_two", "prefix_affinity"):
        fake = FakeDecode(ANSWER)
        async with routing(fake, policy=policy) as gateway:
            await asyncio.gather(*(start(gateway, str(index), **ask(ttft_s=1e-3, tpot_s=1e-6)) for index in range(5)))
            assert gateway.status(asyncio.get_running_loop().time()).router == policy
        assert len(fake.submits) == 5


@pytest.mark.parametrize("seed", range(8))
@on_virtual_time
async def test_whoever_is_cancelled_while_waiting_nothing_is_held(seed: int) -> None:
    rng = random.Random(seed)
    fake = FakeDecode(ANSWER)
    async with routing(fake, min_worth=-99.0, workers=("p", "p2", "d")) as gateway:
        tasks = []
        for number in range(40):
            objectives = ask(ttft_s=rng.choice([None, 0.5, 2.0, 8.0]), deadline_s=rng.choice([0.4, 50.0]))
            tasks.append(start(gateway, str(number), **objectives))
            await asyncio.sleep(rng.choice([0.0, 0.02, 0.2]))
            if rng.random() < 0.3:
                rng.choice(tasks).cancel()
            if rng.random() < 0.2:
                gateway.heartbeat(report("p", stats=replace(STATS, queued_tokens=10, queued_s=rng.random())))
        await asyncio.wait(tasks, timeout=40.0)
        for task in tasks:
            assert task.done()
            if not task.cancelled() and task.exception() is not None:
                assert isinstance(task.exception(), Overloaded | DeadlineExceeded)


# ── outcomes and status ──────────────────────────────────────────────────────────────────────────────────────────────


@on_virtual_time
async def test_every_end_counts_once_but_for_the_clients_own() -> None:
    fake = FakeDecode(ANSWER)
    async with routing(fake, config=CONFIG) as gateway:
        clock = asyncio.get_running_loop().time
        # First, before the router has learned how much faster than its cost model this worker is.
        with pytest.raises(Overloaded):
            await start(gateway, "refused", **ask(ttft_s=0.1))
        await start(gateway, "good", **ask(ttft_s=1.0, tpot_s=1.0))
        await start(gateway, "slow", **ask(ttft_s=1.0, tpot_s=STEP_S / 2))
        with pytest.raises(InvalidArgument):
            await start(gateway, "bad", **ask(slo_class="nobody"))
        cancelled = start(gateway, "cancelled", **ask())
        await asyncio.sleep(3 * STEP_S)
        cancelled.cancel()
        await asyncio.wait([cancelled])
        outcomes = gateway.outcomes.recent(clock())
        assert [outcome.reason for outcome in outcomes] == ["rejected", "finished", "finished"]
        assert [(outcome.met_ttft, outcome.met_tpot) for outcome in outcomes] == [
            (False, False),
            (True, True),
            (True, False),
        ]
        status = gateway.status(clock())
        assert (status.router, status.requests_finished, status.requests_rejected) == ("goodput", 2, 1)
        assert (status.attainment, status.attainment_ttft, status.attainment_window) == (1 / 3, 2 / 3, 3)
    fake = FakeDecode()
    async with routing(fake, config=CONFIG) as gateway:
        failing = start(gateway, "failing", **ask(on_failure="fail"))
        await asyncio.sleep(5 * STEP_S)
        fake.push("d:1", Failed("failing#1", TransferFailed("lost")))
        with pytest.raises(TransferFailed):
            await failing
        with pytest.raises(DeadlineExceeded):
            await start(gateway, "late", **ask(deadline_s=0.5))
        assert [outcome.reason for outcome in gateway.outcomes.recent(clock())] == ["failed", "expired"]
        fake.break_link("d:1")


@on_virtual_time
async def test_what_is_learned_comes_from_answers_that_were_predicted() -> None:
    async with routing(FakeDecode(ANSWER)) as gateway:
        for _ in range(20):
            await start(gateway, "r", **ask())
        # 0.3 s were predicted, 11 ms it took.
        assert gateway.router.calibration.ttft["pair"].quantile(0.5) == pytest.approx(1.1 * STEP_S / 0.3)
        assert gateway.router.calibration.tpot.quantile(0.5) == pytest.approx(STEP_S / 1e-3)
        assert gateway.view.answer_tokens < CONFIG.router.typical_answer_tokens
        assert gateway.view.answer_tokens > LENGTH


# ── what workers are asked ───────────────────────────────────────────────────────────────────────────────────────────


@on_virtual_time
async def test_a_gap_in_the_events_asks_for_a_snapshot() -> None:
    async with routing(FakeDecode()) as gateway:
        interval_s = WIDE.heartbeat_interval_s
        assert gateway.heartbeat(report("d", kv_events=KVEvents(1, True, (1,)))) == HeartbeatReply(interval_s)
        assert gateway.heartbeat(report("d", kv_events=KVEvents(3, False, (2,)))).kv_resync
        assert gateway.heartbeat(report("d", kv_events=KVEvents(4, False, (3,)))).kv_resync
        assert not gateway.heartbeat(report("d", kv_events=KVEvents(5, True, (1, 2, 3)))).kv_resync
        assert not gateway.heartbeat(report("d")).kv_resync


@on_virtual_time
async def test_a_controller_is_told_of_requests_and_says_who_is_to_be_what() -> None:
    controller = Controller()
    async with routing(FakeDecode(ANSWER), controller=controller) as gateway:
        assert gateway.heartbeat(report("d")).role == ""
        task = start(gateway, "r", **ask(ttft_s=5.0))
        await asyncio.sleep(STEP_S)
        assert (gateway.on_its_way("p"), gateway.on_its_way("d"), gateway.on_its_way("x")) == (1, 1, 0)
        await task
        assert (gateway.on_its_way("p"), gateway.on_its_way("d")) == (0, 0)
        with pytest.raises(Overloaded):
            await start(gateway, "r", **ask(ttft_s=0.1))
        assert "p" in gateway.view.prefill_order
        controller.wanted["p"] = "decode"
        assert gateway.heartbeat(report("p")).role == "decode"
        assert "p" not in gateway.view.prefill_order, "nothing more is sent to one that is asked to change"
    assert controller.told == [
        ("arrived", 3, LENGTH, Objectives(5.0)),
        ("answered", 3, 2, LENGTH, LENGTH),
        ("arrived", 3, LENGTH, Objectives(0.1)),
    ]


@on_virtual_time
async def test_a_prefix_that_a_worker_told_of_brings_requests_there() -> None:
    fake = FakeDecode(ANSWER)
    async with routing(fake, workers=("p0", "p1", "p2", "d")) as gateway:
        prompt = tuple(range(50))
        request = replace(REQUEST, prompt=prompt, params=SamplingParams(max_tokens=4))
        for name in ("p0", "p1", "p2"):
            gateway.heartbeat(report(name, kv_events=KVEvents(1, True)))
        await collect(gateway, request)
        first = fake.submits[0][1].prefill_address
        for index in range(3):
            await collect(gateway, replace(request, prompt=(*prompt, index)))
        assert {submit.prefill_address for _, submit in fake.submits} == {first}
        await collect(gateway, replace(request, salt=b"another tenant"))
