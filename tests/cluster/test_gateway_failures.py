"""Workers that fail their requests: another one goes on, without a token too many or too few, or the client is told."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import pytest

from cluster.gateway_config import FailureConfig, GatewayConfig
from cluster.messages import Chunk, Complete
from decode_worker.stream import Delta, Failed
from engine.batch import Sampled
from engine.errors import (
    DeadlineExceeded,
    HandedBack,
    InvalidArgument,
    Overloaded,
    TandemError,
    TransferFailed,
    Unavailable,
)
from engine.log_fields import FIELDS
from engine.request import FinishReason
from engine.sampling import SamplingParams
from tests.cluster.fake_decode import STEP_S, FakeDecode, on_virtual_time
from tests.cluster.serving import (
    ANSWER,
    CONFIG,
    LENGTH,
    REQUEST,
    STATS,
    TO_THE_END,
    TOKENIZER,
    collect,
    report,
    serving,
    start,
)

LOST = Unavailable("connection reset")
PROMPT = tuple(TOKENIZER.encode("hello"))


def with_failures(**changes: float) -> GatewayConfig:
    return CONFIG.model_copy(update={"failures": FailureConfig.model_validate(changes)})


def text_of(parts: tuple[list[Chunk], Complete]) -> str:
    return "".join(chunk.text for chunk in parts[0])


@on_virtual_time
async def test_why_a_request_was_tried_again_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeDecode(ANSWER)
    with caplog.at_level(logging.INFO, "cluster.failures"):
        async with serving(fake, ("p", "d1", "d2")) as gateway:
            task = start(gateway, "r", params=TO_THE_END.params)
            await asyncio.sleep(1.5 * STEP_S)
            [first] = fake.attached
            fake.break_link(first, LOST)
            await task
    [record] = caplog.records
    assert record.message == f"p, {first[:2]}: lost the decode worker at {first}: connection reset; retry 1"
    assert getattr(record, FIELDS) == {"request_id": "r"}


@pytest.mark.parametrize("gone_s", [20.0, 100.0])
@on_virtual_time
async def test_a_request_that_has_begun_waits_longer_for_a_worker_than_a_new_one(gone_s: float) -> None:
    fake = FakeDecode(ANSWER)
    config = CONFIG.model_copy(update={"default_deadline_s": None})
    async with serving(fake, config=config) as gateway:
        task = start(gateway, "r", params=TO_THE_END.params)
        await asyncio.sleep(2.5 * STEP_S)
        gateway.heartbeat(report("d", stats=replace(STATS, draining=True)))
        fake.break_link("d:1", LOST)
        with pytest.raises(Unavailable, match="no decode worker is available; waited 5 s"):
            await collect(gateway, replace(REQUEST, request_id="new"))
        await asyncio.sleep(gone_s)
        if gone_s > FailureConfig().wait_s:
            with pytest.raises(Unavailable, match="waited 60 s"):
                await task
        gateway.heartbeat(report("d", incarnation=2))
        if gone_s < FailureConfig().wait_s:
            assert text_of(await task) == "One, two, three."


@pytest.mark.parametrize("gone_s", [20.0, 100.0])
@on_virtual_time
async def test_a_request_that_has_begun_waits_for_a_worker_that_has_room_for_it(gone_s: float) -> None:
    fake = FakeDecode([5] * 400)
    config = CONFIG.model_copy(update={"default_deadline_s": None})
    async with serving(fake, ("p", "d1"), config) as gateway:
        task = start(gateway, "r", params=SamplingParams(max_tokens=400))
        await asyncio.sleep(160.5 * STEP_S)
        gateway.heartbeat(report("d2", stats=replace(STATS, blocks_total=20, blocks_free=20)))
        fake.break_link("d1:1", LOST)
        gateway.view.remove("d1")
        await asyncio.sleep(gone_s)
        if gone_s > FailureConfig().wait_s:
            with pytest.raises(Unavailable, match="no worker with room for 403 tokens is available; waited 60 s"):
                await task
            [outcome] = gateway.outcomes.recent(asyncio.get_running_loop().time())
            assert outcome.reason == "failed", "the cluster's fault, which counts"
        else:
            gateway.heartbeat(report("d1", incarnation=2))
            _, complete = await task
            assert complete.usage.completion_tokens == 400


@pytest.mark.parametrize("after", [0.5, 1.5, 2.5, 5.5, LENGTH + 0.5])
@on_virtual_time
async def test_an_answer_goes_on_where_its_worker_was_lost(after: float) -> None:
    fake = FakeDecode(ANSWER)
    async with serving(fake, ("p", "d1", "d2")) as gateway:
        task = start(gateway, "r", params=TO_THE_END.params)
        await asyncio.sleep(after * STEP_S)
        [first] = fake.attached or ["d1:1"]
        if fake.sessions:
            fake.break_link(first, LOST)
        chunks, complete = await task
        assert [token.token_id for chunk in chunks for token in chunk.tokens] == ANSWER
        assert text_of((chunks, complete)) == complete.choices[0].text == "One, two, three."
        assert complete.usage.completion_tokens == LENGTH
        if len(fake.submits) == 2:
            (_, before), (address, again) = fake.submits
            assert address != first, "another worker goes on"
            assert complete.receipt.retries == 1
            assert complete.receipt.retry_s > 0
            assert again.seed == before.seed, "the draws go on in the same sequence"
            drawn = len(again.token_ids) - len(PROMPT)
            assert again.token_ids == PROMPT + tuple(ANSWER[:drawn])
            assert again.prompt_tokens == (len(PROMPT) if drawn else 0)
        else:
            assert complete.receipt.retries == 0


@pytest.mark.parametrize(
    ("lie", "text"),
    [
        (Delta("r#1", 1, (Sampled(5),)), "it drew choice 1 of 1"),
        (Delta("r#1", 0, (Sampled(5),) * (LENGTH + 1)), f"it drew more than 1 times {LENGTH} tokens"),
        (Delta("r#1", 0, (Sampled((1 << 32) - 1),)), "it drew tokens that are none of 265"),
    ],
    ids=["choice", "many", "none"],
)
@on_virtual_time
async def test_a_worker_that_says_what_nobody_asked_for_loses_its_link_and_its_requests_go_on_elsewhere(
    lie: Delta, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What it drew might become part of a prompt: another worker would die of a token that there is not."""
    fake = FakeDecode(ANSWER)
    async with serving(fake, ("p", "d1", "d2")) as gateway:
        task = start(gateway, "r", params=TO_THE_END.params)
        await asyncio.sleep(2.5 * STEP_S)
        [liar] = fake.attached
        fake.push(liar, lie)
        _, complete = await task
        assert [token.token_id for token in complete.choices[0].tokens] == ANSWER
        assert [address == liar for address, _ in fake.submits] == [True, False]
    [line] = [record.getMessage() for record in caplog.records if "was not believed" in record.getMessage()]
    assert text in line


@on_virtual_time
async def test_each_of_several_choices_goes_on_where_it_was() -> None:
    fake = FakeDecode(ANSWER)
    async with serving(fake, ("p", "d1", "d2")) as gateway:
        task = start(gateway, "r", params=SamplingParams(n=3, max_tokens=LENGTH))
        await asyncio.sleep(3.5 * STEP_S)
        [first] = fake.attached
        # One of them is further than the others, and one is at its end.
        more = tuple(Sampled(token_id) for token_id in ANSWER[2:])
        fake.push(first, Delta("r#1", 1, more[:2]), Delta("r#1", 2, more, FinishReason.LENGTH))
        fake.break_link(first, LOST)
        chunks, complete = await task
        for index in range(3):
            drawn = [token.token_id for chunk in chunks if chunk.index == index for token in chunk.tokens]
            assert drawn == ANSWER
            assert complete.choices[index].text == "One, two, three."
        again = fake.submits[1][1]
        assert again.token_ids == PROMPT
        assert [(len(choice.token_ids), choice.is_finished) for choice in again.resumed] == [
            (2, False),
            (4, False),
            (LENGTH, True),
        ]


@on_virtual_time
async def test_a_stop_string_is_found_across_the_loss() -> None:
    fake = FakeDecode(ANSWER)
    async with serving(fake, ("p", "d1", "d2")) as gateway:
        task = start(gateway, "r", params=SamplingParams(max_tokens=40, stop=("two, th",)))
        await asyncio.sleep((2.5 + len(TOKENIZER.encode("One, tw"))) * STEP_S)
        fake.break_link(fake.attached[0], LOST)
        chunks, complete = await task
        assert text_of((chunks, complete)) == "One, "
        assert complete.choices[0].matched_stop_str == "two, th"


@on_virtual_time
async def test_only_the_word_that_it_is_over_was_lost() -> None:
    fake = FakeDecode()
    async with serving(fake, ("p", "d1", "d2")) as gateway:
        task = start(gateway, "r", params=TO_THE_END.params)
        await asyncio.sleep(2 * STEP_S)
        tokens = tuple(Sampled(token_id) for token_id in ANSWER)
        fake.push(fake.attached[0], Delta("r#1", 0, tokens, FinishReason.LENGTH))
        fake.break_link(fake.attached[0], LOST)
        _, complete = await task
        assert complete.choices[0].text == "One, two, three."
        assert len(fake.submits) == 1


@pytest.mark.parametrize(
    ("policy", "after", "retries"), [("fail", 1.5, 0), ("fail", 5, 0), ("retry", 1.5, 1), ("retry", 5, 0)]
)
@on_virtual_time
async def test_a_request_says_what_becomes_of_it(policy: str, after: float, retries: int) -> None:
    fake = FakeDecode(ANSWER)
    async with serving(fake, ("p", "d1", "d2")) as gateway:
        task = start(gateway, "r", params=TO_THE_END.params, on_failure=policy)
        await asyncio.sleep(after * STEP_S)
        fake.break_link(fake.attached[0], LOST)
        if retries:
            assert text_of(await task) == "One, two, three."
        else:
            with pytest.raises(Unavailable, match=r"lost the decode worker at d[12]:1: connection reset"):
                await task
        assert len(fake.submits) == 1 + retries


@on_virtual_time
async def test_a_policy_that_there_is_not() -> None:
    async with serving(FakeDecode(ANSWER)) as gateway:
        with pytest.raises(InvalidArgument, match="on_failure: got 'hope', expected one of recompute, retry, fail"):
            await collect(gateway, replace(REQUEST, on_failure="hope"))


@pytest.mark.parametrize("error", [DeadlineExceeded("decode"), InvalidArgument("prompt", "long", "a shorter one")])
@on_virtual_time
async def test_what_any_worker_would_say_is_final(error: TandemError) -> None:
    fake = FakeDecode()
    async with serving(fake, ("p", "d1", "d2")) as gateway:
        task = start(gateway, "r")
        await asyncio.sleep(5 * STEP_S)
        fake.push(fake.attached[0], Failed("r#1", error))
        with pytest.raises(type(error)):
            await task
        assert len(fake.submits) == 1
        assert fake.cancels == [], "the worker has ended it by itself"
        fake.break_link(fake.attached[0])


@pytest.mark.parametrize("error", [TransferFailed("no KV"), Overloaded("too many wait"), TandemError("internal error")])
@on_virtual_time
async def test_a_failure_is_tried_again_until_the_attempts_are_used_up(error: TandemError) -> None:
    fake = FakeDecode()
    async with serving(fake, ("p", "d"), with_failures(max_attempts=3)) as gateway:
        task = start(gateway, "r")
        for attempt in range(1, 4):
            while len(fake.submits) < attempt:  # noqa: ASYNC110
                await asyncio.sleep(STEP_S)
            fake.push("d:1", Failed(f"r#{attempt}", error))
        with pytest.raises(type(error)):
            await task
        assert len(fake.submits) == 3
        fake.break_link("d:1")


@on_virtual_time
async def test_who_failed_is_left_alone_for_a_while_and_then_tried_with_one_request() -> None:
    fake = FakeDecode(ANSWER)
    async with serving(fake, ("p", "d1", "d2"), with_failures(shun_s=1.0)) as gateway:
        fake.down = {"d1:1"}

        async def who_answers(count: int) -> set[str]:
            return {(await collect(gateway, TO_THE_END))[1].receipt.decode_worker for _ in range(count)}

        while not any(name == "d1:1" for name, _ in fake.submits) and "d1" not in gateway.view._shunned:
            await collect(gateway, TO_THE_END)
        assert await who_answers(3) == {"d2"}
        fake.down = set()
        await asyncio.sleep(1.0)
        assert "d1" in await who_answers(8)


@on_virtual_time
async def test_a_worker_that_has_restarted_is_trusted_at_once() -> None:
    fake = FakeDecode(ANSWER)
    async with serving(fake, ("p", "d"), with_failures(shun_s=100.0, max_shun_s=100.0)) as gateway:
        task = start(gateway, "r", params=TO_THE_END.params)
        await asyncio.sleep(5 * STEP_S)
        fake.break_link("d:1", LOST)
        await asyncio.sleep(1.0)
        assert not task.done(), "nobody else is there"
        gateway.heartbeat(report("d", incarnation=2))
        assert text_of(await task) == "One, two, three."
        assert asyncio.get_running_loop().time() < 2.0


@on_virtual_time
async def test_the_prefill_worker_is_blamed_for_what_it_did_not_send() -> None:
    fake = FakeDecode(ANSWER)
    async with serving(fake, ("p1", "p2", "d")) as gateway:
        fake.answer = []
        task = start(gateway, "r", params=TO_THE_END.params)
        await asyncio.sleep(2 * STEP_S)
        error = Unavailable("nobody answers there")
        error.is_of_prefill = True
        fake.answer = ANSWER
        fake.push("d:1", Failed("r#1", error))
        await task
        (_, before), (_, again) = fake.submits
        assert before.prefill_address != again.prefill_address
        assert len(fake.attached) == 1, "the decode worker stands"
        fake.break_link("d:1")


@on_virtual_time
async def test_a_deadline_ends_the_waiting_for_another_try() -> None:
    fake = FakeDecode()
    async with serving(fake, ("p", "d"), with_failures(backoff_s=1000.0, max_backoff_s=1000.0)) as gateway:
        task = start(gateway, "r", deadline_s=2.0)
        await asyncio.sleep(2 * STEP_S)
        fake.push("d:1", Failed("r#1", TandemError("internal error")))
        with pytest.raises(DeadlineExceeded, match="during recovery"):
            await task
        assert asyncio.get_running_loop().time() == 2.0
        fake.break_link("d:1")


@on_virtual_time
async def test_what_was_begun_and_is_given_back_goes_on_elsewhere() -> None:
    fake = FakeDecode(ANSWER)
    async with serving(fake, ("p", "d1", "d2")) as gateway:
        task = start(gateway, "r", params=TO_THE_END.params)
        await asyncio.sleep(5.5 * STEP_S)
        fake.push(fake.attached[0], Failed("r#1", HandedBack("this worker drains")))
        chunks, complete = await task
        assert [token.token_id for chunk in chunks for token in chunk.tokens] == ANSWER
        assert complete.receipt.retries == 0, "nobody has failed"
        fake.break_link(fake.attached[0])
