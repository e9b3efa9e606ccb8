"""The runner's contract: layers are announced in order, cancelling waits, KV moves between runners bit for bit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from engine.batch import PENDING_TOKEN, Batch, Row, SampleSpec
from engine.config import EngineConfig
from engine.engine import load_engine
from engine.kv_cache import KVCache
from engine.model import Hidden, Model
from engine.model_source import ModelFiles
from engine.sampler import Sampler
from engine.sampling import SamplingParams
from engine.torch_runner import TorchRunner
from engine.weights import load_weights, open_weights
from kernels.attention_batch import AttentionBatch
from kernels.choice import choose_kernels
from tests.tiny_models import GREEDY, generate, make_runner, prefill, prompt_of, save_model, scattered_blocks

GREEDY_FIRST = SampleSpec(GREEDY, 0, 0)
OPEN = 1000
KERNELS = choose_kernels(torch.device("cpu"), torch.float32, "dense", "auto")
SEEDED = SamplingParams(temperature=1.5, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return ModelFiles("hf", save_model("llama", tmp_path_factory.mktemp("llama")))


class GatedModel(Model):
    """Runs one layer for each release of `gate`; `entered` says that the forward pass has come that far."""

    def layers(self, hidden: Hidden, layers: range, batch: AttentionBatch, kv: torch.Tensor) -> Hidden:
        self.entered.set()
        assert self.gate.acquire(timeout=10), "nobody opened the gate"
        return super().layers(hidden, layers, batch, kv)

    entered: threading.Event
    gate: threading.Semaphore


def make_gated(files: ModelFiles) -> tuple[TorchRunner, GatedModel]:
    source = open_weights(files)
    cpu = torch.device("cpu")
    model = GatedModel(source.config, load_weights(source, torch.float32, cpu), KERNELS)
    model.entered, model.gate = threading.Event(), threading.Semaphore(0)
    plain = make_runner(files)
    cache = KVCache(plain.layout, cpu, KERNELS.ops)
    sampler = Sampler(source.config.vocab_size, ())
    return TorchRunner(model, cache, sampler, device=cpu, layer_group=1), model


async def until(event: threading.Event) -> None:
    """Waits for another thread, without a thread of its own that might be left behind."""
    while not event.is_set():  # noqa: ASYNC110 - set by a thread, not by the loop
        await asyncio.sleep(0.001)


def one_row(length: int = 9) -> Batch:
    return Batch((Row("s", prompt_of(length), 0, list(range(8)), GREEDY_FIRST),))


@pytest.mark.parametrize(("layer_group", "expected"), [(1, [(0, 1), (1, 2)]), (2, [(0, 2)]), (5, [(0, 2)])])
async def test_layers_are_announced_in_order_before_the_end(
    files: ModelFiles, layer_group: int, expected: list[tuple[int, int]]
) -> None:
    runner = make_runner(files, layer_group=layer_group)
    calls: list[tuple[int, int]] = []
    threads = set()

    def listen(first: int, end: int) -> None:
        calls.append((first, end))
        threads.add(threading.current_thread())

    await runner.run(one_row(), listen)
    assert calls == expected
    assert threads == {threading.current_thread()}, "the listener runs on the event loop's thread"
    await runner.close()


async def test_announced_layers_are_in_the_cache_while_later_ones_still_run(files: ModelFiles) -> None:
    runner, model = make_gated(files)
    plain = make_runner(files)
    await plain.run(one_row())
    expected = bytes(plain.export_blocks([0, 1], range(1), 4))
    seen: list[bytes] = []
    announced = asyncio.Event()

    def listen(first: int, end: int) -> None:
        seen.append(bytes(runner.export_blocks([0, 1], range(first, end), 4)))
        announced.set()

    run = asyncio.create_task(runner.run(one_row(), listen))
    model.gate.release()
    await announced.wait()
    assert seen == [expected]
    assert not run.done()
    model.gate.release(OPEN)
    await run
    assert len(seen) == 2
    await runner.close()
    await plain.close()


async def test_cancelling_waits_for_the_forward_pass(files: ModelFiles) -> None:
    runner, model = make_gated(files)
    run = asyncio.create_task(runner.run(one_row()))
    await until(model.entered)
    for _ in range(3):
        # However often, and however impatiently.
        run.cancel()
        await asyncio.sleep(0.01)
        assert not run.done(), "let go of blocks that a forward pass still writes"
    model.gate.release(OPEN)
    with pytest.raises(asyncio.CancelledError):
        await run
    # The thread is free again and the runner sound.
    assert len((await runner.run(one_row())).sampled[0]) == 1
    await runner.close()


def chain(length: int = 9, block_ids: Sequence[int] = range(8)) -> list[Batch]:
    """A prompt, and two steps that follow it; a second sequence draws before it in each batch."""
    other = [Row("o", prompt_of(4), 0, [20, 21], GREEDY_FIRST), Row("o", (3,), 4, [20, 21], GREEDY_FIRST)]
    ahead = Row("s", (PENDING_TOKEN,), length, block_ids, replace(GREEDY_FIRST, step=1), follows=1)
    last = replace(ahead, start=length + 1, sample=replace(GREEDY_FIRST, step=2), follows=0)
    return [Batch((other[0], *one_row(length).rows)), Batch((ahead, other[1])), Batch((last,))]


async def test_a_run_that_follows_one_under_way_takes_its_draws(files: ModelFiles) -> None:
    runner, model = make_gated(files)
    plain = make_runner(files)
    expected = await generate(plain, prompt_of(9), 3)
    told: list[tuple[int, int, int]] = []
    batches = chain()
    runs = [
        asyncio.create_task(runner.run(batch, lambda *layers, number=number: told.append((number, *layers))))
        for number, batch in enumerate(batches[:2])
    ]
    await until(model.entered)
    assert told == []
    model.gate.release(OPEN)
    outs = [await run for run in runs]
    # The run before need not be under way any more.
    outs.append(await runner.run(batches[2]))
    drawn = [outs[0].sampled[1], outs[1].sampled[0], outs[2].sampled[0]]
    assert [sampled.token_id for (sampled,) in drawn] == expected
    assert told == [(0, 0, 1), (0, 1, 2), (1, 0, 1), (1, 1, 2)], "one batch after the other"
    await runner.close()
    await plain.close()


async def test_a_run_that_follows_a_failed_one_fails(files: ModelFiles) -> None:
    runner = make_runner(files)
    await runner.run(chain()[0])
    bad = asyncio.create_task(runner.run(Batch((Row("s", [97], 0, [0], None),))))
    ahead = asyncio.create_task(runner.run(chain()[1]))
    for run in (bad, ahead):
        with pytest.raises(IndexError):
            await run
    await runner.close()


async def test_cancelling_two_runs_waits_for_the_one_that_runs_and_calls_the_other_off(files: ModelFiles) -> None:
    runner, model = make_gated(files)
    passes = 0

    def count(first: int, end: int) -> None:
        nonlocal passes
        passes += 1

    runs = [asyncio.create_task(runner.run(batch, count)) for batch in chain()[:2]]
    await until(model.entered)
    for run in runs:
        run.cancel()
    await asyncio.sleep(0.01)
    assert [run.done() for run in runs] == [False, True]
    model.gate.release(OPEN)
    with pytest.raises(asyncio.CancelledError):
        await runs[0]
    assert len((await runner.run(one_row(), count)).sampled[0]) == 1
    assert passes == 2 + 2, "two layers of the first run, none of the second, two of the last"
    await runner.close()


async def test_an_error_in_the_forward_pass_reaches_the_caller(files: ModelFiles) -> None:
    runner = make_runner(files)
    with pytest.raises(IndexError):
        await runner.run(Batch((Row("s", [97], 0, [0], None),)))
    assert len((await runner.run(one_row())).sampled[0]) == 1
    await runner.close()


async def test_other_blocks_move_while_a_forward_pass_runs(files: ModelFiles) -> None:
    runner, model = make_gated(files)
    plain = make_runner(files)
    expected = await plain.run(one_row())
    run = asyncio.create_task(runner.run(one_row()))
    await until(model.entered)
    payload = bytes(range(256)) * 5
    layers = range(2)
    for block_id in range(20, 30):
        runner.import_blocks([block_id], 0, layers, 4, memoryview(payload), "float32")
        model.gate.release(OPEN)
        assert bytes(runner.export_blocks([block_id], layers, 4)) == payload
    assert await run == expected
    assert all(bytes(runner.export_blocks([block_id], layers, 4)) == payload for block_id in range(20, 30))
    await runner.close()
    await plain.close()


async def test_only_sampling_rows_get_tokens_one_per_choice(files: ModelFiles) -> None:
    runner = make_runner(files)
    three = SampleSpec(SamplingParams(temperature=2.0, n=3), 7, 0, (0, 1, 2))
    rows = (
        Row("a", prompt_of(5), 0, [0, 1], None),
        Row("b", prompt_of(6), 0, [2, 3], three),
        Row("c", prompt_of(1), 0, [4], GREEDY_FIRST),
    )
    sampled = (await runner.run(Batch(rows))).sampled
    assert [len(row) for row in sampled] == [0, 3, 1]
    assert (await runner.run(Batch(rows[:1]))).sampled == ((),)
    await runner.close()


async def test_copies_run_before_the_forward_pass(files: ModelFiles) -> None:
    """Copy-on-write: a fork that continues in a copy of the shared tail block reads what the original wrote."""
    runner = make_runner(files)
    prompt = prompt_of(7)
    await runner.run(Batch((Row("s", prompt[:6], 0, [10, 11], None),)))
    forked = Batch((Row("f", prompt[6:], 6, [10, 40], GREEDY_FIRST),), copies=((11, 40),))
    got = runner.logits(forked)
    original = runner.logits(Batch((Row("s", prompt[6:], 6, [10, 11], GREEDY_FIRST),)))
    assert torch.equal(got, original)
    await runner.close()


@pytest.mark.parametrize("params", [GREEDY, SEEDED])
async def test_kv_moved_to_another_runner_continues_bit_for_bit(files: ModelFiles, params: SamplingParams) -> None:
    source, target = make_runner(files), make_runner(files)
    for length in (1, 4, 5, 33):
        prompt = prompt_of(length)
        spec = SampleSpec(params, 11, 0, prompt_ids=prompt)
        there, here = list(range(20, 40)), list(reversed(range(20)))
        (first,) = await prefill(source, prompt, there, 1 << 20, spec)
        count, tail = divmod(length, 4)
        for layers in (range(1), range(1, 2)):
            whole = source.export_blocks(there[:count], layers, 4)
            if count:
                target.import_blocks(here[:count], 0, layers, 4, memoryview(whole), "float32")
            if tail:
                part = source.export_blocks(there[count : count + 1], layers, tail)
                target.import_blocks(here[count : count + 1], 0, layers, tail, memoryview(part), "float32")
        spec = SampleSpec(params, 11, 1, (0,), prompt, (first.token_id,))
        rows = [Row("s", [first.token_id], length, blocks, spec) for blocks in (there, here)]
        split, single = (runner.logits(Batch((row,))) for runner, row in ((target, rows[1]), (source, rows[0])))
        assert torch.equal(split, single)
    await source.close()
    await target.close()


async def test_a_sequence_resumed_elsewhere_continues_the_same_random_sequence(files: ModelFiles) -> None:
    """Preemption by recompute: prompt and output so far are prefilled again, and the next draws are the same."""
    runner, other = make_runner(files), make_runner(files, block_size=2)
    prompt = prompt_of(10)
    whole = await generate(runner, prompt, 16, params=SEEDED, seed=5)
    known = whole[:6]
    blocks = scattered_blocks(other, 40)
    spec = SampleSpec(SEEDED, 5, 6, (0,), prompt, tuple(known))
    resumed = [(await prefill(other, prompt + known, blocks, 5, spec))[0].token_id]
    while len(resumed) < 10:
        output = known + resumed
        spec = replace(spec, step=len(output), output_ids=tuple(output))
        row = Row("s", output[-1:], len(prompt) + len(output) - 1, blocks, spec)
        resumed.append((await other.run(Batch((row,)))).sampled[0][0].token_id)
    assert known + resumed == whole
    await runner.close()
    await other.close()


async def test_closing_waits_for_a_run_under_way(files: ModelFiles) -> None:
    runner, model = make_gated(files)
    run = asyncio.create_task(runner.run(one_row()))
    await until(model.entered)
    closing = asyncio.create_task(runner.close())
    await asyncio.sleep(0.01)
    assert not closing.done()
    model.gate.release(OPEN)
    await closing
    assert len((await run).sampled[0]) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
async def test_the_same_tokens_on_a_gpu(files: ModelFiles) -> None:
    config = EngineConfig(device="cuda", dtype="float32", block_size=4, kv_cache_bytes=1 << 20)
    engine = load_engine(config, files)
    cpu = make_runner(files)
    for length in (1, 5, 40):
        assert await generate(engine.runner, prompt_of(length), 8) == await generate(cpu, prompt_of(length), 8)
    await engine.runner.close()
    await cpu.close()
