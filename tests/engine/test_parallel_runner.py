"""A worker of several ranks is a runner like any other: the same tokens, the same KV, the same contract."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from engine.batch import PENDING_TOKEN, Batch, Row, SampleSpec
from engine.config import EngineConfig
from engine.engine import load_engine, load_follower
from engine.errors import ConfigError, TransferFailed
from engine.generate import Generator, Prompt
from engine.model_source import ModelFiles
from engine.rank_messages import batch_message, batch_of
from engine.ranks import Member, RankLost, Ranks, Rendezvous
from engine.sampling import SamplingParams
from tests.golden import snapshot
from tests.golden.default_model import require_default_model
from tests.rank_threads import RankThreads, rank_threads
from tests.tiny_models import CONFIGS, GREEDY, generate, make_runner, poison, prefill, prompt_of, save_model

GREEDY_FIRST = SampleSpec(GREEDY, 0, 0)
SEEDED = SamplingParams(temperature=1.5, repetition_penalty=1.2)
# 1, a block and a chunk, and their neighbours.
LENGTHS = (1, 3, 4, 5, 9, 10, 11, 33)
CHUNK = 10


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return ModelFiles("hf", save_model("llama", tmp_path_factory.mktemp("llama")))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Ranks are threads here: more of torch's own would only be in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(tensor: int, pipeline: int = 1) -> EngineConfig:
    return EngineConfig(
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        block_size=4,
        layer_group=1,
        dtype="float32",
        device="cpu",
        kv_cache_bytes=1 << 18,
        threads=1,
    )


@pytest.mark.parametrize("variant", CONFIGS)
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
async def test_the_same_tokens(variant: str, tensor: int, pipeline: int, tmp_path) -> None:
    files = ModelFiles("hf", save_model(variant, tmp_path))
    plain = make_runner(files)
    async with rank_threads(config(tensor, pipeline), files) as (engine, _):
        runner = engine.runner
        assert runner.layout.matches(plain.layout)
        poison(runner)
        for length in LENGTHS if (tensor, pipeline) == (2, 2) else LENGTHS[-3:]:
            expected = await generate(plain, prompt_of(length), 5, CHUNK)
            assert await generate(runner, prompt_of(length), 5, CHUNK) == expected
    await plain.close()


async def test_three_ranks_share_two_kv_heads(files: ModelFiles) -> None:
    plain = make_runner(files)
    async with rank_threads(config(3), files) as (engine, _):
        poison(engine.runner)
        assert await generate(engine.runner, prompt_of(33), 8) == await generate(plain, prompt_of(33), 8)
        blocks = range(4)
        payload = bytes(plain.export_blocks(blocks, range(2), 4))
        engine.runner.import_blocks(blocks, 0, range(2), 4, memoryview(payload), "float32")
        assert bytes(engine.runner.export_blocks(blocks, range(2), 4)) == payload
    await plain.close()


async def test_seeded_sampling_and_many_rows(files: ModelFiles) -> None:
    plain = make_runner(files)
    three = SampleSpec(SamplingParams(temperature=2.0, n=3), 7, 0, (0, 1, 2))
    rows = (
        Row("a", prompt_of(5), 0, [0, 1], None),
        Row("b", prompt_of(6), 0, [2, 3], three),
        Row("c", prompt_of(1), 0, [4], GREEDY_FIRST),
        Row("d", prompt_of(9), 0, [7, 6, 5], SampleSpec(SEEDED, 3, 0, (0,), prompt_of(9))),
    )
    async with rank_threads(config(2, 2), files) as (engine, _):
        assert await generate(engine.runner, prompt_of(10), 12, params=SEEDED, seed=5) == await generate(
            plain, prompt_of(10), 12, params=SEEDED, seed=5
        )
        expected = await plain.run(Batch(rows))
        assert [len(row) for row in expected.sampled] == [0, 3, 1, 1]
        assert await engine.runner.run(Batch(rows)) == expected
        assert (await engine.runner.run(Batch(rows[:1]))).sampled == ((),)
        # Decode: what three of them drew, one of them in a copy of its block.
        drawn = [expected.sampled[1][0].token_id, expected.sampled[2][0].token_id, expected.sampled[3][0].token_id]
        step = Batch(
            (
                Row("b", drawn[:1], 6, [2, 10], GREEDY_FIRST),
                Row("c", drawn[1:2], 1, [4], GREEDY_FIRST),
                Row("d", drawn[2:], 9, [7, 6, 5], GREEDY_FIRST),
            ),
            copies=((3, 10),),
        )
        assert await engine.runner.run(step) == await plain.run(step)
    await plain.close()


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (2, 2)])
async def test_a_batch_may_follow_one_that_still_runs(files: ModelFiles, tensor: int, pipeline: int) -> None:
    first = Batch((Row("s", prompt_of(5), 0, [0, 1], GREEDY_FIRST), Row("t", prompt_of(7), 0, [2, 3], GREEDY_FIRST)))
    then = Batch(
        (
            Row("t", (PENDING_TOKEN,), 7, [2, 3], GREEDY_FIRST, follows=1),
            Row("u", prompt_of(3), 0, [5], GREEDY_FIRST),
            Row("s", (PENDING_TOKEN,), 5, [0, 1], GREEDY_FIRST, follows=0),
        )
    )
    plain = make_runner(files)
    expected = [await plain.run(first), await plain.run(then)]
    async with rank_threads(config(tensor, pipeline), files) as (engine, _):
        assert await asyncio.gather(engine.runner.run(first), engine.runner.run(then)) == expected
    await plain.close()


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
async def test_layers_are_announced_when_all_ranks_have_them(files: ModelFiles, tensor: int, pipeline: int) -> None:
    async with rank_threads(config(tensor, pipeline), files) as (engine, _):
        runner = engine.runner
        seen: list[tuple[int, int, bytes]] = []
        batch = Batch((Row("s", prompt_of(9), 0, [3, 1, 2], None),))
        for _ in range(5):
            poison(runner)
            seen.clear()
            await runner.run(
                batch,
                lambda first, end: seen.append((first, end, bytes(runner.export_blocks([3, 1], range(first, end), 4)))),
            )
            after = [
                (layer, layer + 1, bytes(runner.export_blocks([3, 1], range(layer, layer + 1), 4))) for layer in (0, 1)
            ]
            assert seen == after


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
async def test_kv_moves_between_workers_of_different_ranks(files: ModelFiles, tensor: int, pipeline: int) -> None:
    plain, layers = make_runner(files), range(2)
    async with rank_threads(config(tensor, pipeline), files) as (engine, _):
        runner = engine.runner
        prompt, there, here = prompt_of(18), [5, 9, 2, 7, 1], [4, 3, 8, 0, 6]
        (first,) = await prefill(runner, prompt, there, CHUNK, GREEDY_FIRST)
        assert (first,) == await prefill(plain, prompt, there, CHUNK, GREEDY_FIRST)
        kv = [
            torch.frombuffer(bytearray(each.export_blocks(there[:4], layers, 4)), dtype=torch.float32)
            for each in (runner, plain)
        ]
        # Sums of the same products in another order, through two layers.
        torch.testing.assert_close(kv[0], kv[1], rtol=1e-4, atol=1e-5)
        expected = await generate(plain, prompt, 8)
        for source, target in ((runner, plain), (plain, runner)):
            poison(target)
            for layer in layers:
                whole = source.export_blocks(there[:4], range(layer, layer + 1), 4)
                target.import_blocks(here[:4], 0, range(layer, layer + 1), 4, memoryview(whole), "float32")
                tail = source.export_blocks(there[4:], range(layer, layer + 1), 2)
                target.import_blocks(here[4:], 0, range(layer, layer + 1), 2, memoryview(tail), "float32")
                again = target.export_blocks(here[:4], range(layer, layer + 1), 4)
                assert bytes(again) == bytes(whole)
            row = Row("s", [first.token_id], 18, here, GREEDY_FIRST)
            assert (await target.run(Batch((row,)))).sampled[0][0].token_id == expected[1]
            await prefill(plain, prompt, there, CHUNK, GREEDY_FIRST)
    await plain.close()


async def test_kv_of_another_dtype_and_block_size(files: ModelFiles) -> None:
    source, plain = make_runner(files, block_size=8, dtype="bfloat16"), make_runner(files)
    await prefill(source, prompt_of(14), [1, 2], CHUNK, GREEDY_FIRST)
    payload = memoryview(source.export_blocks([1, 2], range(2), 7))
    async with rank_threads(config(2, 2), files) as (engine, _):
        for runner in (engine.runner, plain):
            runner.import_blocks([9, 8, 7, 6], 1, range(2), 7, payload, "bfloat16")
        for layer in range(2):
            got, expected = (each.export_blocks([8, 7], range(layer, layer + 1), 4) for each in (engine.runner, plain))
            assert bytes(got) == bytes(expected)
    await source.close()
    await plain.close()


async def test_a_wrong_payload_is_refused_before_anything_is_sent(files: ModelFiles) -> None:
    async with rank_threads(config(2), files) as (engine, worker):
        block = engine.runner.layout.token_bytes * 4
        for size, dtype in ((block - 1, "float32"), (0, "float32"), (2 * block, "float32"), (block, "int3")):
            with pytest.raises(TransferFailed):
                engine.runner.import_blocks([0], 0, range(1), 4, memoryview(bytes(size)), dtype)
        assert len(await generate(engine.runner, prompt_of(5), 3)) == 3
    assert worker.errors == {}


async def test_other_blocks_move_while_passes_run(files: ModelFiles) -> None:
    plain = make_runner(files)
    expected = await generate(plain, prompt_of(40), 12)
    async with rank_threads(config(2, 2), files) as (engine, _):
        runner, done = engine.runner, threading.Event()
        moved = 0

        def move() -> None:
            nonlocal moved
            payload = bytes(index % 251 for index in range(4 * runner.layout.token_bytes))
            while not done.is_set():
                runner.import_blocks([60], 0, range(1), 4, memoryview(payload), "float32")
                assert bytes(runner.export_blocks([60], range(1), 4)) == payload
                moved += 1

        mover = asyncio.create_task(asyncio.to_thread(move))
        assert await generate(runner, prompt_of(40), 12) == expected
        done.set()
        await mover
        assert moved
    await plain.close()


async def test_a_failed_pass_ends_all_ranks(files: ModelFiles) -> None:
    async with rank_threads(config(2), files) as (engine, worker):
        with pytest.raises(IndexError):
            await engine.runner.run(Batch((Row("s", [97], 0, [0], None),)))
        with pytest.raises(RankLost, match="out of step"):
            await engine.runner.run(Batch((Row("s", [1], 0, [0], None),)))
        with pytest.raises(RankLost, match="out of step"):
            engine.runner.export_blocks([0], range(1), 4)
    assert isinstance(worker.errors[1], IndexError)


async def test_a_rank_that_hangs_costs_a_bounded_time(files: ModelFiles) -> None:
    worker = RankThreads(config(2), files, timeout_s=0.5)
    joined: list[object] = []
    # It joins, and then never does anything.
    thread = threading.Thread(target=lambda: joined.append(load_follower(worker.config, worker.files, worker.ranks(1))))
    thread.start()
    engine = worker.lead()
    thread.join()
    assert joined
    for attempt in (
        lambda: engine.runner.run(Batch((Row("s", [1], 0, [0], None),))),
        lambda: asyncio.to_thread(engine.runner.export_blocks, [0], range(1), 4),
    ):
        start = time.monotonic()
        with pytest.raises(RankLost):
            await attempt()
        assert time.monotonic() - start < 5
    await engine.runner.close()


def test_several_ranks_need_their_processes(files: ModelFiles) -> None:
    with pytest.raises(ConfigError, match="tensor_parallel: got 2, expected 1 where a single process does it all"):
        load_engine(config(2), files)
    with pytest.raises(ConfigError, match="pipeline_parallel: got 2"):
        load_engine(config(1, 2), files)


def test_a_rank_says_why_it_cannot_join(files: ModelFiles) -> None:
    rendezvous = Rendezvous.open()
    Rendezvous.reach(rendezvous.address).fail(1, "model.safetensors: does not exist")
    with pytest.raises(ConfigError, match=r"rank 1: model\.safetensors: does not exist"):
        load_engine(config(2), files, Ranks(Member(0, 2, 1), rendezvous))


def test_ranks_of_different_models_do_not_join() -> None:
    rendezvous = Rendezvous.open()
    rendezvous.store.set("identity-1", "another model")
    with pytest.raises(ConfigError, match="ranks of one worker differ: rank 0 has a model, 1 another model"):
        rendezvous.meet(Member(0, 2, 1), "a model")


def test_a_rank_that_died_is_not_waited_for() -> None:
    rendezvous = Rendezvous.open()
    rendezvous.abandon()
    with pytest.raises(RankLost, match="rank 1 did not join"):
        rendezvous.meet(Member(0, 2, 1), "a model")


def test_long_batches_are_told_whole() -> None:
    rows = tuple(Row("s", prompt_of(3000), 7, list(range(9000)), GREEDY_FIRST if odd else None) for odd in (0, 1))
    batch = Batch(rows, copies=((1, 2), (3, 4)))
    got, only_leader_knows = batch_of(batch_message(batch))
    assert not only_leader_knows
    assert got.copies == batch.copies
    for ours, theirs in zip(batch.rows, got.rows, strict=True):
        assert (list(ours.token_ids), ours.start, list(ours.block_ids)) == (
            list(theirs.token_ids),
            theirs.start,
            list(theirs.block_ids),
        )
        assert (ours.sample is None) == (theirs.sample is None)


@pytest.mark.model
@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("tensor", "pipeline", "prompts"), [(2, 1, 64), (3, 1, 16), (2, 2, 16)])
async def test_the_golden_tokens(tensor: int, pipeline: int, prompts: int) -> None:
    """9 query heads on 3 KV heads: split 6 and 3, or 3 each."""
    settings = EngineConfig(
        tensor_parallel=tensor, pipeline_parallel=pipeline, device="cpu", dtype="float32", kv_cache_bytes=512 << 20
    )
    records = snapshot.read()[:: 64 // prompts]
    async with rank_threads(settings, require_default_model(), timeout_s=120) as (engine, _):
        generator = Generator(engine.runner, frozenset(), engine.model.max_context)
        params = SamplingParams(temperature=0.0, max_tokens=snapshot.NEW_TOKENS, min_tokens=snapshot.NEW_TOKENS)
        for first in range(0, len(records), 16):
            part = records[first : first + 16]
            answers = await generator.generate([Prompt(tuple(record.token_ids), params, 0) for record in part])
            assert [answer[0].token_ids for answer in answers] == [record.expected for record in part]
