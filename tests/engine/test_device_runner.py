"""The GPU's runner against the plain one: recorded passes, padding, two steps in flight. Needs no file and no network.

Where no GPU is, Triton interprets, and "replaying" a recording runs the recorded work again on the recorded inputs:
what a replay reads, and what it must not depend on, is the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import pytest
import torch

from engine.batch import PENDING_TOKEN, Batch, KVLayout, Row, SampleSpec, StepOutput
from engine.block_pool import BlockPool
from engine.device_runner import DeviceRunner
from engine.device_sampler import DeviceSampler
from engine.forward import Forward
from engine.forward_graphs import GraphedForward, padded_rows
from engine.inbox import Inbox
from engine.kv_cache import KVCache
from engine.model import Model
from engine.model_config import ModelConfig
from engine.pulse import Pulse
from engine.sampler import Sampler
from engine.sampling import SamplingParams
from engine.torch_runner import TorchRunner
from engine.weight_parts import random_weights
from kernels import torch_ops
from kernels.capture import Capture, Result
from kernels.choice import Kernels
from kernels.gpu import ops
from kernels.gpu.cuda_capture import CudaCapture
from kernels.linear import DenseLinear
from tests.kernels.gpu.conftest import device
from tests.kernels.gpu.quick_interpreter import quick_interpreter

__all__ = ["device"]

CONFIG = ModelConfig(
    architecture="llama",
    name="tiny",
    num_layers=3,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=97,
    max_context=256,
    rope_theta=500.0,
    rms_norm_eps=1e-5,
)
LAYOUT = KVLayout("tiny", 3, 2, 16, "float32", 16, 24)
GREEDY = SamplingParams(temperature=0.0)
SEEDED = SamplingParams(temperature=1.2, top_k=20)
PROMPTS = ((3, 1, 4, 1, 5), (9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2), (2,))


class Rerun:
    """A Capture for devices that record nothing: runs the work again, into the very tensors it gave at first."""

    def __call__(self, work: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        first = work()

        def replay() -> None:
            for old, new in zip(_tensors(first), _tensors(work()), strict=True):
                old.copy_(new)

        return replay, first


def _tensors(result: object) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result for tensor in _tensors(part)] if isinstance(result, tuple) else []


@pytest.fixture(autouse=True)
def _quick(device: torch.device) -> Iterator[None]:
    with quick_interpreter() if device.type == "cpu" else nullcontext():
        yield


def poisoned(where: torch.device, module: object) -> KVCache:
    cache = KVCache(LAYOUT, where, module)
    cache.tensor.fill_(float("nan"))
    return cache


def make_plain() -> TorchRunner:
    cpu = torch.device("cpu")
    kernels = Kernels("torch", torch_ops, DenseLinear, lambda threads, cpus: None)
    model = Model(CONFIG, random_weights(CONFIG, torch.float32, 5, cpu), kernels)
    return TorchRunner(model, poisoned(cpu, torch_ops), Sampler(97, ()), device=cpu, layer_group=2)


def make_device(where: torch.device, chunks: Sequence[int] = ()) -> tuple[DeviceRunner, GraphedForward, KVCache]:
    """The same weights on `where`."""
    weights = random_weights(CONFIG, torch.float32, 5, torch.device("cpu"))
    for key, tensor in weights.tensors.items():
        weights.tensors[key] = tensor.to(where)
    model = Model(CONFIG, weights, Kernels("triton", ops, DenseLinear, lambda threads, cpus: None))
    cache = poisoned(where, ops)
    capture: Capture = CudaCapture() if where.type == "cuda" else Rerun()
    forward = GraphedForward(Forward(model, cache.tensor, 2), capture, padded_rows(4), chunks)
    return DeviceRunner(forward, cache, DeviceSampler(97, (), where), device=where), forward, cache


def tables() -> list[tuple[int, ...]]:
    return [(7, 2, 11, 4), (1, 9, 3, 20), (0, 22, 13, 5)]


def prompt_rows(params: SamplingParams) -> Batch:
    return Batch(
        tuple(
            Row(str(index), prompt, 0, table, SampleSpec(params, index, 0))
            for index, (prompt, table) in enumerate(zip(PROMPTS, tables(), strict=True))
        )
    )


def next_rows(step: int, params: SamplingParams, known: Sequence[int] | None) -> Batch:
    """Decode step `step` (1 = the first) of all prompts; what they continue is `known`, or still on the device."""
    rows = []
    for index, (prompt, table) in enumerate(zip(PROMPTS, tables(), strict=True)):
        token, follows = (PENDING_TOKEN, index) if known is None else (known[index], None)
        start = len(prompt) + step - 1
        rows.append(Row(str(index), (token,), start, table, SampleSpec(params, index, step), follows=follows))
    return Batch(tuple(rows))


def tokens_of(output: StepOutput) -> list[int]:
    return [sampled.token_id for row in output.sampled for sampled in row]


async def one_by_one(runner: TorchRunner | DeviceRunner, params: SamplingParams, steps: int) -> list[list[int]]:
    drawn = [tokens_of(await runner.run(prompt_rows(params)))]
    for step in range(1, steps):
        drawn.append(tokens_of(await runner.run(next_rows(step, params, drawn[-1]))))
    return drawn


async def two_in_flight(runner: DeviceRunner, params: SamplingParams, steps: int) -> list[list[int]]:
    batches = [prompt_rows(params), *(next_rows(step, params, None) for step in range(1, steps))]
    drawn = []
    under_way = asyncio.create_task(runner.run(batches[0]))
    for batch in batches[1:]:
        await asyncio.sleep(0)
        following = asyncio.create_task(runner.run(batch))
        drawn.append(tokens_of(await under_way))
        under_way = following
    return [*drawn, tokens_of(await under_way)]


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("loop", [one_by_one, two_in_flight])
def test_tokens_are_those_of_the_plain_runner(
    device: torch.device, loop: Callable[..., object], params: SamplingParams
) -> None:
    async def main() -> None:
        plain, (runner, forward, _) = make_plain(), make_device(device)
        expected = await one_by_one(plain, params, 6)
        assert await loop(runner, params, 6) == expected
        assert forward.recorded_count == 1, "all decode steps replay one recording"
        await plain.close()
        await runner.close()

    asyncio.run(main())


def test_a_canary_between_two_steps_changes_neither(device: torch.device) -> None:
    async def main() -> None:
        plain, (runner, _, _) = make_plain(), make_device(device)
        expected = await one_by_one(plain, GREEDY, 3)
        pool, pulse, mail = BlockPool(LAYOUT.num_blocks, LAYOUT.block_size), Pulse(10.0), Inbox[object](1)
        pool.new("others")
        pool.append("others", (LAYOUT.num_blocks - 1) * LAYOUT.block_size)
        assert not set(pool.next_blocks(1)) & {block for table in tables() for block in table}
        drawn = [tokens_of(await runner.run(prompt_rows(GREEDY)))]
        for step in (1, 2):
            pulse.canary_s = 0.0
            await pulse.rest(runner, pool, mail, lambda _: None)
            drawn.append(tokens_of(await runner.run(next_rows(step, GREEDY, drawn[-1]))))
        assert pulse.is_proven.is_set()
        assert drawn == expected
        pool.free("others")
        pool.check()
        await plain.close()
        await runner.close()

    asyncio.run(main())


def test_a_chunk_is_replayed_group_by_group(device: torch.device) -> None:
    prompt = tuple(range(8, 40))

    async def main() -> None:
        plain, (runner, forward, _) = make_plain(), make_device(device, chunks=(16,))
        for table in ((7, 2, 11), (4, 1, 9)):
            announced: list[tuple[int, int]] = []
            for start in (0, 16):
                spec = SampleSpec(GREEDY, 0, 0) if start else None
                batch = Batch((Row("s", prompt[start : start + 16], start, table, spec),))
                expected = await plain.run(batch)
                got = await runner.run(batch, lambda first, end: announced.append((first, end)))  # noqa: B023
                assert got == expected
            assert announced == [(0, 2), (2, 3)] * 2
            for layers in (range(2), range(2, 3)):
                ours, theirs = (
                    torch.frombuffer(bytearray(each.export_blocks(table[:2], layers, 16)), dtype=torch.float32)
                    for each in (runner, plain)
                )
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        assert forward.recorded_count == 2, "a chunk that is sampled from and one that is not"
        await plain.close()
        await runner.close()

    asyncio.run(main())


def test_padding_writes_nothing(device: torch.device) -> None:
    async def main() -> None:
        runner, _, cache = make_device(device)
        await one_by_one(runner, GREEDY, 3)
        written = {
            block for prompt, table in zip(PROMPTS, tables(), strict=True) for block in table[: len(prompt) // 16 + 1]
        }
        untouched = [block for block in range(LAYOUT.num_blocks) if block not in written]
        assert cache.tensor[:, untouched].isnan().all()
        await runner.close()

    asyncio.run(main())


def test_nothing_follows_a_batch_that_failed(device: torch.device) -> None:
    async def main() -> None:
        runner, _, _ = make_device(device)
        await runner.run(prompt_rows(GREEDY))
        broken = Batch((Row("s", (1,), 40, (3,), SampleSpec(GREEDY, 0, 0)),))
        with pytest.raises(AssertionError, match="cannot hold"):
            await runner.run(broken)
        with pytest.raises(RuntimeError, match="the batch before has failed"):
            await runner.run(next_rows(1, GREEDY, None))
        await one_by_one(runner, GREEDY, 2)
        await runner.close()

    asyncio.run(main())


def test_a_cancelled_run_waits_for_its_step(device: torch.device) -> None:
    async def main() -> None:
        plain, (runner, _, _) = make_plain(), make_device(device)
        run = asyncio.create_task(runner.run(prompt_rows(GREEDY)))
        await asyncio.sleep(0)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert await one_by_one(runner, GREEDY, 3) == await one_by_one(plain, GREEDY, 3)
        await plain.close()
        await runner.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("rows", "sizes"), [(1, (1,)), (3, (1, 2, 4)), (16, (1, 2, 4, 8, 16)), (40, (1, 2, 4, 8, 16, 32, 48))]
)
def test_padded_sizes(rows: int, sizes: tuple[int, ...]) -> None:
    assert padded_rows(rows) == sizes
