"""A cache in float8: half the bytes, the same loop, and KV that travels."""

from __future__ import annotations

import pytest
import torch

from engine.batch import Batch, Row, SampleSpec
from engine.config import EngineConfig
from engine.engine import load_engine
from engine.model_source import ModelFiles
from engine.torch_runner import TorchRunner
from tests.tiny_models import GREEDY, generate, prompt_of, save_model, scattered_blocks


def make(files: ModelFiles, kv_dtype: str = "float8_e4m3") -> TorchRunner:
    config = EngineConfig(block_size=4, layer_group=1, device="cpu", kv_dtype=kv_dtype, kv_cache_bytes=1 << 18)
    runner = load_engine(config, files).runner
    assert isinstance(runner, TorchRunner)
    return runner


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return ModelFiles("hf", save_model("llama", tmp_path_factory.mktemp("llama")))


async def test_it_holds_four_times_as_many_blocks_as_float32(files: ModelFiles) -> None:
    small, large = make(files), make(files, "auto")
    assert small.layout.dtype == "float8_e4m3"
    assert small.layout.token_bytes * 4 == large.layout.token_bytes
    assert small.layout.num_blocks // large.layout.num_blocks == 4
    for runner in (small, large):
        await runner.close()


async def test_chunks_read_back_what_they_wrote(files: ModelFiles) -> None:
    """Even the chunk's own keys are read from the cache, so whole and chunked prompts see the same rounded KV."""
    runner = make(files)
    prompt = prompt_of(30)
    assert await generate(runner, prompt, 12) == await generate(runner, prompt, 12, chunk=7)
    await runner.close()


async def test_the_answer_stays_close(files: ModelFiles) -> None:
    prompt = prompt_of(30)
    logits = []
    for kv_dtype in ("auto", "float8_e4m3"):
        runner = make(files, kv_dtype)
        row = Row("s", prompt, 0, scattered_blocks(runner, 30), SampleSpec(GREEDY, 0, 0))
        logits.append(runner.logits(Batch((row,)))[0])
        await runner.close()
    similarity = torch.nn.functional.cosine_similarity(logits[0], logits[1], dim=0)
    assert 0.97 < similarity < 0.99999, "rounded, but the same model"


async def test_blocks_travel_as_bytes(files: ModelFiles) -> None:
    source, target = make(files), make(files)
    prompt, table = prompt_of(11), [5, 9, 2]
    spec = SampleSpec(GREEDY, 0, 1)
    await source.run(Batch((Row("s", prompt, 0, table, None),)))
    layers = range(source.layout.num_layers)
    payload = bytes(source.export_blocks(table, layers, 4))
    assert len(payload) == len(layers) * 3 * 4 * source.layout.token_bytes
    target.import_blocks([1, 0, 7], 0, layers, 4, memoryview(payload), "float8_e4m3")
    assert bytes(target.export_blocks([1, 0, 7], layers, 4)) == payload
    after = [
        runner.logits(Batch((Row("s", (3,), 11, blocks, spec),), copies))
        for runner, blocks, copies in ((source, [5, 9, 2], ()), (target, [1, 0, 8], ((7, 8),)))
    ]
    assert torch.equal(after[0], after[1])
    for runner in (source, target):
        await runner.close()
