"""The gateway from request to receipt: answers, refusals, routes, status."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cluster.endings import Ended
from cluster.gateway import LAST_WORD_S, Gateway
from cluster.links import DecodeLinks
from cluster.messages import GenerateRequest, Usage
from cluster.registry import HeartbeatReply, Registry
from engine.batch import Sampled
from engine.errors import (
    InvalidArgument,
    NotFound,
    Overloaded,
    TandemError,
    Unavailable,
)
from engine.request import FinishReason
from engine.sampling import SamplingParams
from tests.cluster.fake_decode import CACHED_TOKENS, STEP_S, WORKER_RECEIPT, FakeDecode, on_virtual_time
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

# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@on_virtual_time
async def test_a_request_streams_its_text_and_ends_with_a_receipt() -> None:
    fake = FakeDecode(ANSWER)
    async with serving(fake) as gateway:
        chunks, complete = await collect(gateway, replace(TO_THE_END, salt=b"tenant"))
    assert "".join(chunk.text for chunk in chunks) == "One, two, three."
    assert [token.token_id for chunk in chunks for token in chunk.tokens] == ANSWER
    [choice] = complete.choices
    assert (choice.text, choice.finish_reason) == ("One, two, three.", FinishReason.LENGTH)
    assert complete.usage == Usage(len(TOKENIZER.encode("hello")), LENGTH, CACHED_TOKENS)
    receipt = complete.receipt
    assert (receipt.prefill_worker, receipt.decode_worker) == ("p", "d")
    assert (receipt.prefill_queue_s, receipt.kv_bytes, receipt.early_share) == (0.5, 640, 0.75)
    assert receipt.gateway_queue_s == 0.0
    assert receipt.ttft_s == pytest.approx(2.1 * STEP_S)
    assert receipt.tpot_s == pytest.approx(STEP_S)
    [(address, submit)] = fake.submits
    assert address == "d:1"
    assert submit.prefill_address == "p:1"
    assert (submit.salt, submit.deadline_s) == (b"tenant", 50.0)
    assert submit.token_ids == tuple(TOKENIZER.encode("hello"))
    assert fake.cancels == []


@on_virtual_time
async def test_a_stop_token_ends_the_answer_without_text() -> None:
    async with serving(FakeDecode([*ANSWER, 0], eos=0)) as gateway:
        _, complete = await collect(gateway)
    [choice] = complete.choices
    assert (choice.text, choice.finish_reason, choice.matched_token_id) == ("One, two, three.", FinishReason.STOP, 0)
    assert complete.usage.completion_tokens == LENGTH + 1


@on_virtual_time
async def test_a_stop_string_cancels_the_rest() -> None:
    fake = FakeDecode(ANSWER)
    params = SamplingParams(max_tokens=40, stop=(", t",))
    async with serving(fake) as gateway:
        chunks, complete = await collect(gateway, replace(REQUEST, params=params))
    [choice] = complete.choices
    assert (choice.text, choice.finish_reason, choice.matched_stop_str) == ("One", FinishReason.STOP, ", t")
    assert "".join(chunk.text for chunk in chunks) == "One"
    assert TOKENIZER.decode([token.token_id for token in choice.tokens]) == "One, t"
    assert fake.cancels == ["r#1"]
    assert complete.receipt.decode_worker == "d"
    assert complete.receipt.ttft_s > 0
    assert complete.receipt.prefill_s == WORKER_RECEIPT.prefill_s, "its worker still says where the time went"
    assert complete.usage.cached_tokens == CACHED_TOKENS


@on_virtual_time
@pytest.mark.parametrize("fails", [False, True], ids=["mute", "lost"])
async def test_a_worker_that_says_nothing_of_what_was_cut_holds_nobody_up(fails: bool) -> None:
    fake = FakeDecode(ANSWER)
    fake.is_mute = True
    told: list[Ended] = []
    loop = asyncio.get_running_loop()
    async with serving(fake) as gateway:
        gateway.endings.observe(SimpleNamespace(ended=told.append))
        if fails:
            loop.call_later(0.4, lambda: fake.break_link(*fake.sessions))
        began_s = loop.time()
        params = SamplingParams(max_tokens=40, stop=(", t",))
        _, complete = await collect(gateway, replace(REQUEST, params=params, deadline_s=0.3))
        assert loop.time() - began_s < 0.3 + LAST_WORD_S
    assert complete.choices[0].text == "One"
    assert complete.receipt.prefill_s == 0.0
    assert [(request.outcome.reason, request.worker_told) for request in told] == [("finished", False)]


@on_virtual_time
async def test_several_choices_each_come_whole() -> None:
    fake = FakeDecode(ANSWER)
    async with serving(fake) as gateway:
        chunks, complete = await collect(gateway, replace(REQUEST, params=SamplingParams(n=3, max_tokens=LENGTH)))
        assert [choice.text for choice in complete.choices] == ["One, two, three."] * 3
        assert {chunk.index for chunk in chunks} == {0, 1, 2}
        assert complete.usage.completion_tokens == 3 * LENGTH
        _, complete = await collect(gateway, replace(REQUEST, params=SamplingParams(n=2, stop=("two",))))
        assert [choice.text for choice in complete.choices] == ["One, "] * 2
    assert fake.cancels == ["r#2"]


@on_virtual_time
async def test_token_ids_alone_need_no_tokenizer() -> None:
    fake = FakeDecode((7, 8))
    links = DecodeLinks(fake)
    gateway = Gateway(None, MODEL, Registry(3, 60), links, CONFIG, random.Random(1))
    gateway.heartbeat(report("d"))
    request = GenerateRequest("", (1, 2, 3), SamplingParams(max_tokens=2))
    chunks, complete = await collect(gateway, request)
    assert [chunk.tokens for chunk in chunks] == [(Sampled(7),), (Sampled(8),)]
    assert complete.choices[0].text == ""
    assert complete.receipt.prefill_worker == ""
    assert fake.submits[0][1].prefill_address == ""
    await links.close()


@on_virtual_time
async def test_a_seed_is_kept_or_drawn_from_the_gateways_own_chance() -> None:
    fake = FakeDecode(ANSWER)
    async with serving(fake) as gateway:
        for seed in (5, 0, None, None):
            await collect(gateway, replace(TO_THE_END, params=replace(TO_THE_END.params, seed=seed)))
    seeds = [submit.seed for _, submit in fake.submits]
    assert seeds[:2] == [5, 0]
    assert seeds[2] != seeds[3]
    again = FakeDecode(ANSWER)
    async with serving(again) as gateway:
        for _ in range(4):
            await collect(gateway, TO_THE_END)
    assert all(0 <= submit.seed < 1 << 63 for _, submit in again.submits)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"prompt": ""}, InvalidArgument, "text: got ''"),
        ({"model": "gpt"}, NotFound, "model 'gpt' not found; known: tiny"),
        (
            {"params": SamplingParams(top_p=2.0)},
            InvalidArgument,
            r"sampling_params.top_p: got 2.0, expected .* \(0, 1\]",
        ),
        (
            {"params": SamplingParams(max_tokens=1500)},
            InvalidArgument,
            "prompt \\+ max_tokens: got '1503 tokens', expected at most 1024",
        ),
    ],
)
@on_virtual_time
async def test_a_bad_request_is_refused_and_the_next_one_served(
    change: dict[str, object], error: type[TandemError], text: str
) -> None:
    fake = FakeDecode(ANSWER)
    async with serving(fake) as gateway:
        with pytest.raises(error, match=text):
            await collect(gateway, replace(REQUEST, **change))
        await collect(gateway, TO_THE_END)
    assert len(fake.submits) == 1


@on_virtual_time
async def test_an_id_can_be_used_again_only_after_its_request() -> None:
    async with serving(FakeDecode(ANSWER)) as gateway:
        first = start(gateway, "same", params=TO_THE_END.params)
        await asyncio.sleep(STEP_S)
        with pytest.raises(InvalidArgument, match="request_id: got 'same', expected an id that no running request has"):
            await collect(gateway, replace(REQUEST, request_id="same"))
        await first
        await start(gateway, "same", params=TO_THE_END.params)


@on_virtual_time
async def test_one_request_too_many_is_told_to_come_again() -> None:
    async with serving(FakeDecode(ANSWER)) as gateway:
        tasks = [start(gateway, name, params=TO_THE_END.params) for name in "abcd"]
        await asyncio.sleep(STEP_S)
        status = gateway.status(asyncio.get_running_loop().time())
        assert (status.requests_running, status.requests_waiting) == (2, 2)
        with pytest.raises(Overloaded, match="retry after"):
            await start(gateway, "e")
        receipts = [complete.receipt for _, complete in await asyncio.gather(*tasks)]
    assert receipts[0].gateway_queue_s == 0.0
    assert receipts[2].gateway_queue_s == pytest.approx((1.1 + LENGTH) * STEP_S)


@on_virtual_time
async def test_a_worker_of_another_model_is_not_let_in() -> None:
    async with serving(FakeDecode(), workers=()) as gateway:
        with pytest.raises(InvalidArgument, match="model: got 'other', expected 'tiny'"):
            gateway.heartbeat(report("d", model="other"))
        assert gateway.heartbeat(report("d")) == HeartbeatReply(CONFIG.heartbeat_interval_s)


# ── routes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@on_virtual_time
async def test_without_a_worker_a_request_waits_for_one() -> None:
    async with serving(FakeDecode(ANSWER), workers=("p",)) as gateway:
        task = start(gateway, "r", params=TO_THE_END.params)
        await asyncio.sleep(2.0)
        gateway.heartbeat(report("p2"))
        await asyncio.sleep(1.0)
        gateway.heartbeat(report("d"))
        _, complete = await task
        assert complete.receipt.gateway_queue_s == 3.0
        assert complete.receipt.decode_worker == "d"


@on_virtual_time
async def test_but_not_for_ever() -> None:
    async with serving(FakeDecode(), workers=("p",)) as gateway:
        with pytest.raises(Unavailable, match="no decode worker is available; waited 5 s"):
            await collect(gateway)
        assert asyncio.get_running_loop().time() == 5.0


@on_virtual_time
async def test_requests_between_two_heartbeats_are_spread_by_what_was_sent_already() -> None:
    fake = FakeDecode()
    config = CONFIG.model_copy(update={"max_running": 8})
    async with serving(fake, ("p0", "p1", "d0", "d1"), config) as gateway:
        tasks = [start(gateway, f"r{index}") for index in range(8)]
        await asyncio.sleep(10 * STEP_S)
        prefills = [submit.prefill_address for _, submit in fake.submits]
        decodes = [address for address, _ in fake.submits]
        assert {name: prefills.count(name) for name in prefills} == {"p0:1": 4, "p1:1": 4}
        assert {name: decodes.count(name) for name in decodes} == {"d0:1": 4, "d1:1": 4}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


# ── status ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@on_virtual_time
async def test_status_shows_workers_and_requests() -> None:
    config = CONFIG.model_copy(update={"fresh_s": 3.0})
    async with serving(FakeDecode(ANSWER), ("p", "d"), config) as gateway:
        await collect(gateway, TO_THE_END)
        await asyncio.sleep(10)
        gateway.heartbeat(report("p", stats=replace(STATS, queued_tokens=7, draining=True)))
        status = gateway.status(asyncio.get_running_loop().time())
        assert (status.model, status.requests_running, status.requests_finished) == ("tiny", 0, 1)
        assert [(worker.worker_id, worker.fresh, worker.draining) for worker in status.workers] == [
            ("d", False, False),
            ("p", True, True),
        ]
        assert status.workers[0].heartbeat_age_s > 10
        assert status.workers[1].queued_tokens == 7
