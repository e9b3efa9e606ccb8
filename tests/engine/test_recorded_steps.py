"""Decode steps that are replayed on a CPU: the very tokens and KV of the same steps without recordings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.batch import Batch, Row, SampleSpec
from engine.config import EngineConfig
from engine.engine import build_runner
from engine.model_source import ModelFiles
from engine.sampling import SamplingParams
from engine.torch_runner import TorchRunner
from engine.weights import load_weights, open_weights
from kernels.cpu.library import load
from tests.tiny_models import poison, prompt_of, save_model

pytestmark = pytest.mark.skipif(load() is None, reason="no C++ kernels on this machine")

GREEDY = SamplingParams(temperature=0.0)
SEEDED = SamplingParams(temperature=1.3, repetition_penalty=1.2, logprobs=3)


def make(files: ModelFiles, dtype: str, graph_rows: int, weight_format: str = "dense") -> TorchRunner:
    config = EngineConfig(
        block_size=4, layer_group=1, dtype=dtype, device="cpu", graph_rows=graph_rows, weight_format=weight_format
    )
    source = open_weights(files)
    cpu = torch.device("cpu")
    weights = load_weights(source, getattr(torch, dtype), cpu)
    runner = build_runner(config, source.config, weights, 128, dtype, cpu)
    assert isinstance(runner, TorchRunner)
    poison(runner)
    return runner


async def answer(runner: TorchRunner, params: SamplingParams) -> list[list[object]]:
    """Four sequences that join and leave: batches of 1 to 4 rows, over contexts of 1 to 60 tokens."""
    lengths, drawn = [1, 7, 20, 40], [[] for _ in range(4)]
    tables = [tuple(range(30 * index, 30 * index + 20)) for index in range(4)]
    for step in range(20):
        rows = []
        for index, length in enumerate(lengths):
            if index > step or step > 12 + index:
                continue
            spec = SampleSpec(params, index, len(drawn[index]), (0,), prompt_of(length), [3] * len(drawn[index]))
            if not drawn[index]:
                rows.append((index, Row(str(index), prompt_of(length), 0, tables[index], spec)))
            else:
                start = length + len(drawn[index]) - 1
                rows.append((index, Row(str(index), (drawn[index][-1].token_id,), start, tables[index], spec)))
        if rows:
            output = await runner.run(Batch(tuple(row for _, row in rows)))
            for (index, _), sampled in zip(rows, output.sampled, strict=True):
                drawn[index] += sampled
    return drawn


@pytest.mark.parametrize("variant", ["llama", "qwen2-window", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_replayed_steps_are_the_same_steps(variant: str, dtype: str, tmp_path: Path) -> None:
    files = ModelFiles("hf", save_model(variant, tmp_path))
    plain, recorded = make(files, dtype, 0), make(files, dtype, 8)
    for params in (GREEDY, SEEDED):
        assert await answer(recorded, params) == await answer(plain, params)
    for runner in (plain, recorded):
        await runner.close()


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
async def test_with_quantised_weights(weight_format: str, tmp_path: Path) -> None:
    files = ModelFiles("hf", save_model("llama", tmp_path))
    plain, recorded = make(files, "float32", 0, weight_format), make(files, "float32", 8, weight_format)
    assert await answer(recorded, GREEDY) == await answer(plain, GREEDY)
    for runner in (plain, recorded):
        await runner.close()
