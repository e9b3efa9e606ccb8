"""What observers are told of how requests end."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from dataclasses import replace

import pytest

from cluster.endings import Ended
from cluster.gateway import Gateway
from cluster.gateway_config import RouterConfig
from cluster.messages import Chunk, Complete, Usage
from engine.errors import DeadlineExceeded, InvalidArgument, Overloaded
from engine.objectives import Objectives
from engine.request import FinishReason
from engine.sampling import SamplingParams
from tests.cluster.fake_decode import CACHED_TOKENS, STEP_S, FakeDecode, on_virtual_time
from tests.cluster.serving import ANSWER, CONFIG, LENGTH, REQUEST, TO_THE_END, TOKENIZER, collect, serving

PROMPT_TOKENS = len(TOKENIZER.encode("hello"))


class Notebook:
    """Implements cluster.endings.Observer."""

    def __init__(self, gateway: Gateway) -> None:
        self.all: list[Ended] = []
        gateway.endings.observe(self)

    def ended(self, request: Ended) -> None:
        self.all.append(request)


@on_virtual_time
async def test_an_answer_is_told_whole_with_the_receipt_that_its_client_gets() -> None:
    async with serving(FakeDecode(ANSWER)) as gateway:
        seen = Notebook(gateway)
        _, complete = await collect(gateway, replace(TO_THE_END, tenant="acme"))
    [ended] = seen.all
    assert (ended.request_id, ended.tenant, ended.problem) == ("r", "acme", "")
    assert ended.outcome.reason == "finished"
    assert ended.outcome.ended_s - ended.arrived_s == pytest.approx((LENGTH + 1.1) * STEP_S)
    assert ended.outcome.ttft_s == complete.receipt.ttft_s
    assert ended.usage == complete.usage == Usage(PROMPT_TOKENS, LENGTH, CACHED_TOKENS)
    assert ended.finish_reasons == (FinishReason.LENGTH,)
    assert ended.receipt == complete.receipt


@on_virtual_time
async def test_every_choice_has_its_reason() -> None:
    params = SamplingParams(n=2, max_tokens=40, stop=(", t",))
    async with serving(FakeDecode(ANSWER)) as gateway:
        seen = Notebook(gateway)
        await collect(gateway, replace(REQUEST, params=params, request_id=""))
    [ended] = seen.all
    assert ended.finish_reasons == (FinishReason.STOP, FinishReason.STOP)
    assert len(ended.request_id) == 16, "its own, where the client gave it none"


@on_virtual_time
async def test_a_request_that_nobody_can_serve_in_time_is_rejected_and_has_no_receipt() -> None:
    config = CONFIG.model_copy(update={"router": RouterConfig(default_prefill_tokens_per_s=0.001)})
    async with serving(FakeDecode(ANSWER), config=config) as gateway:
        seen = Notebook(gateway)
        with pytest.raises(Overloaded) as caught:
            await collect(gateway, replace(REQUEST, objectives=Objectives(ttft_s=0.01)))
    [ended] = seen.all
    assert (ended.outcome.reason, ended.problem) == ("rejected", str(caught.value))
    assert ended.receipt is None
    assert ended.usage == Usage(PROMPT_TOKENS, 0, 0)
    assert gateway.outcomes.rejected_count == 1


@on_virtual_time
async def test_a_deadline_is_told_with_what_had_come_until_then() -> None:
    async with serving(FakeDecode(ANSWER)) as gateway:
        seen = Notebook(gateway)
        with pytest.raises(DeadlineExceeded):
            await collect(gateway, replace(REQUEST, deadline_s=4.5 * STEP_S))
    [ended] = seen.all
    assert (ended.outcome.reason, ended.finish_reasons) == ("expired", (FinishReason.ABORT,))
    assert ended.outcome.ttft_s is not None
    assert 0 < ended.usage.completion_tokens < LENGTH
    assert ended.receipt is not None
    assert ended.receipt.decode_worker == "d"


@on_virtual_time
async def test_a_client_that_leaves_is_told_and_counts_for_nothing() -> None:
    async with serving(FakeDecode(ANSWER)) as gateway:
        seen = Notebook(gateway)
        async with aclosing(gateway.generate(TO_THE_END)) as parts:
            assert isinstance(await anext(parts), Chunk)
        task = asyncio.create_task(collect(gateway, replace(TO_THE_END, request_id="s")))
        await asyncio.sleep(3 * STEP_S)
        task.cancel()
        await asyncio.wait([task])
        now = asyncio.get_running_loop().time()
        assert gateway.outcomes.attainment(now).count == 0
    assert [(ended.request_id, ended.outcome.reason) for ended in seen.all] == [("r", "cancelled"), ("s", "cancelled")]


@on_virtual_time
async def test_who_is_at_fault_itself_counts_for_nothing() -> None:
    async with serving(FakeDecode(ANSWER)) as gateway:
        seen = Notebook(gateway)
        async with aclosing(gateway.generate(TO_THE_END)) as parts:
            await anext(parts)
            with pytest.raises(InvalidArgument, match="request_id"):
                await collect(gateway, TO_THE_END)
            assert isinstance([part async for part in parts][-1], Complete)
        now = asyncio.get_running_loop().time()
        assert gateway.outcomes.attainment(now).count == 1
    assert [ended.outcome.reason for ended in seen.all] == ["invalid", "finished"]


@on_virtual_time
async def test_a_bug_is_a_failure_whose_words_are_kept_back() -> None:
    class Broken(random.Random):
        def getrandbits(self, k: int) -> int:
            raise KeyError("secret")

    async with serving(FakeDecode(ANSWER), rng=Broken(1)) as gateway:
        seen = Notebook(gateway)
        with pytest.raises(KeyError) as caught:
            await collect(gateway, TO_THE_END)
    assert caught.value.__notes__ == ["request r"], "for the log, with its traceback"
    [ended] = seen.all
    assert (ended.outcome.reason, ended.problem) == ("failed", "KeyError")
