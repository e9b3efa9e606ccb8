"""Our own engine as an arm of bench/engine.py: the runner that a worker has, and two loops around it.

    generate    engine/generate.py's: prompts one after another, then all together, one step after another
    decode      from a given context on; like a decode worker it hands each step over while the one before still runs

Weights are a file's, or random for a model whose shapes are known: then nothing that reads files is imported.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch

from bench.model_configs import MODELS
from bench.model_work import ModelWork, work_of
from engine.batch import PENDING_TOKEN, Batch, KVLayout, Row, Runner, SampleSpec
from engine.generate import Generator, Prompt
from engine.kv_cache import DTYPES
from engine.model_config import ModelConfig
from engine.runners import make_runner
from engine.sampling import SamplingParams
from engine.weight_parts import Weights, random_weights
from kernels.choice import WeightFormat, choose_kernels

BLOCK_SIZE = 16
# As in engine/config.py.
LAYER_GROUP = 5
GRAPH_CHUNKS = (256, 512, 1024, 2048)
# Steps before the clock starts: the first ones compile kernels and record graphs.
WARM_UP_STEPS = 4
STEPS_IN_FLIGHT = 2
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


class TandemEngine:
    """`kernels` says whose kernels compute."""

    def __init__(self, runner: Runner, config: ModelConfig, work: ModelWork, kernels: str, chunk: int) -> None:
        self.vocab_size, self.work, self.kernels = config.vocab_size, work, kernels
        self._runner = runner
        self._generator = Generator(runner, frozenset(), config.max_context, prefix_cache=False, token_budget=chunk)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        asyncio.run(self._generator.generate([Prompt(tuple(prompt), params) for prompt in prompts]))

    def decode(self, batch: int, context: int, steps: int) -> float:
        """Seconds of `steps` steps of `batch` sequences, `context` tokens long in the middle of them."""
        return asyncio.run(self._decode(batch, max(1, context - steps // 2), steps))

    async def _decode(self, batch: int, context: int, steps: int) -> float:
        first = max(1, context - WARM_UP_STEPS)
        blocks = -(-(first + WARM_UP_STEPS + steps) // self._runner.layout.block_size)
        # Block 0 is the source of all; neighbours in a table are no neighbours in memory.
        ids = (torch.randperm(batch * blocks) + 1).tolist()
        assert len(ids) < self._runner.layout.num_blocks, f"{len(ids)} blocks and one more are not there"
        tables = [ids[row * blocks : (row + 1) * blocks] for row in range(batch)]
        self._fill_block(0)
        copies = tuple((0, block) for block in ids)
        under_way: deque[asyncio.Future[object]] = deque()
        began, ended = time.perf_counter(), 0
        for step in range(WARM_UP_STEPS + steps):
            rows = _rows(tables, first + step, step)
            if len(under_way) == STEPS_IN_FLIGHT:
                await under_way.popleft()
                ended += 1
                if ended == WARM_UP_STEPS:
                    began = time.perf_counter()
            under_way.append(asyncio.ensure_future(self._runner.run(Batch(rows, () if step else copies))))
            # It is handed over now, not when this loop next waits.
            await asyncio.sleep(0)
        await asyncio.gather(*under_way)
        return time.perf_counter() - began

    def _fill_block(self, block_id: int) -> None:
        """With values as keys and values are: memory as it comes may hold NaN."""
        layout = self._runner.layout
        shape = (layout.num_layers, 1, 2, layout.block_size, layout.num_kv_heads, layout.head_dim)
        raw = torch.randn(shape).to(DTYPES[layout.dtype]).flatten().view(torch.uint8).numpy().data
        self._runner.import_blocks([block_id], 0, range(layout.num_layers), layout.block_size, raw, layout.dtype)


def load(
    random: str,
    model: str,
    *,
    dtype: str,
    weight_format: WeightFormat,
    kernels: Literal["auto", "torch"],
    device: torch.device,
    threads: int,
    pin: bool,
    kv_tokens: int,
    max_batch: int,
    chunk: int,
) -> TandemEngine:
    """`random` names one of bench/model_configs.py; without it `model` is a file, as `tandem serve` takes it."""
    config, weights = _random(random, dtype, device) if random else _read(model, dtype, device)
    chosen = choose_kernels(device, DTYPES[dtype], weight_format, kernels)
    layout = KVLayout(
        model=config.name,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=dtype,
        block_size=BLOCK_SIZE,
        # Every sequence may leave its last block nearly empty, and one block belongs to nobody.
        num_blocks=-(-kv_tokens // BLOCK_SIZE) + max_batch + 1,
    )
    cpus = sorted(os.sched_getaffinity(0))[:threads] if pin else []
    runner = make_runner(
        config,
        weights,
        chosen,
        layout,
        device,
        layer_group=LAYER_GROUP,
        bind=partial(chosen.bind, threads, cpus),
        graph_rows=max_batch,
        graph_chunks=[tokens for tokens in GRAPH_CHUNKS if tokens <= chunk],
    )
    return TandemEngine(runner, config, work_of(config, DTYPES[dtype].itemsize, weight_format), chosen.name, chunk)


def _rows(tables: Sequence[Sequence[int]], start: int, step: int) -> tuple[Row, ...]:
    """Each row's token is what the step before drew in its place."""
    token, spec = (PENDING_TOKEN if step else 0,), SampleSpec(GREEDY, 0, step)
    return tuple(Row(str(row), token, start, table, spec, row if step else None) for row, table in enumerate(tables))


def _random(name: str, dtype: str, device: torch.device) -> tuple[ModelConfig, Weights]:
    config = MODELS[name]
    return config, random_weights(config, DTYPES[dtype], 0, device)


def _read(model: str, dtype: str, device: torch.device) -> tuple[ModelConfig, Weights]:
    from engine.config import DEFAULT_MODEL
    from engine.model_source import resolve
    from engine.weights import load_weights, open_weights

    source = open_weights(resolve(model or DEFAULT_MODEL))
    return source.config, load_weights(source, DTYPES[dtype], device)
