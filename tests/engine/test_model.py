"""Golden tests: tokens and logits of transformers, on tiny models of every architecture and on the real one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.batch import Batch, Row, SampleSpec
from engine.model_source import ModelFiles
from tests.golden.default_model import require_default_model
from tests.tiny_models import (
    CONFIGS,
    GREEDY,
    generate,
    greedy_by,
    load_oracle,
    make_runner,
    prompt_of,
    save_model,
    scattered_blocks,
)

BLOCK = 4
CHUNK = 11
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 15, 16, 17, 21, 22, 23, 31, 32, 33, 43, 44, 45, 90)
NEW_TOKENS = 8


@pytest.fixture(params=list(CONFIGS), scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(request.param, tmp_path_factory.mktemp(request.param))


async def test_greedy_tokens_equal_transformers(folder: Path) -> None:
    oracle = load_oracle(folder)
    runner = make_runner(ModelFiles("hf", folder), block_size=BLOCK)
    different = set()
    for length in LENGTHS:
        prompt = prompt_of(length)
        expected = greedy_by(oracle, prompt, NEW_TOKENS)
        assert await generate(runner, prompt, NEW_TOKENS) == expected, f"{length} tokens at once"
        assert await generate(runner, prompt, NEW_TOKENS, chunk=CHUNK) == expected, f"{length} tokens in chunks"
        different.add(tuple(expected))
    assert len(different) > len(LENGTHS) // 2, "a model that always says the same proves nothing"
    await runner.close()


async def test_logits_err_at_most_twice_as_much_as_transformers(folder: Path) -> None:
    oracle, exact = load_oracle(folder), load_oracle(folder, torch.float64)
    runner = make_runner(ModelFiles("hf", folder), block_size=BLOCK)
    ours = theirs = 0.0
    for length in LENGTHS:
        prompt = torch.tensor([prompt_of(length)])
        with torch.inference_mode():
            truth = exact(prompt).logits[0, -1]
            theirs = max(theirs, (oracle(prompt).logits[0, -1] - truth).abs().max().item())
        row = Row("s", prompt[0].tolist(), 0, scattered_blocks(runner, length), SampleSpec(GREEDY, 0, 0))
        ours = max(ours, (runner.logits(Batch((row,)))[0] - truth).abs().max().item())
    assert ours <= 2 * theirs
    await runner.close()


async def test_a_mixed_batch_gives_every_row_its_own_answer(folder: Path) -> None:
    """Decode rows of very different lengths, a whole prompt and a chunk in one batch, each against running alone."""
    runner = make_runner(ModelFiles("hf", folder), block_size=BLOCK, num_blocks=128)
    rows, alone, first_free = [], [], 0
    for length, new in ((1, 1), (2, 1), (33, 1), (90, 1), (17, 17), (25, 9), (8, 1), (40, 2)):
        prompt = prompt_of(length)
        blocks = list(range(first_free, first_free - (-length // BLOCK)))
        first_free += len(blocks)
        spec = SampleSpec(GREEDY, 0, 0)
        alone.append(runner.logits(Batch((Row("s", prompt, 0, blocks, spec),)))[0])
        rows.append(Row(str(length), prompt[length - new :], length - new, blocks, spec))
    for row in rows:
        # It is this batch that has to write what its rows bring.
        for position in range(row.start, row.end):
            runner._cache.tensor[:, row.block_ids[position // BLOCK], :, position % BLOCK] = torch.nan
    together = runner.logits(Batch(tuple(rows)))
    for row, expected, logits in zip(rows, alone, together, strict=True):
        # Other shapes sum in another order; a wrong block or mask would be off by whole logits.
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4, msg=f"row of {row.seq_id} tokens")
    await runner.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
async def test_half_width_types_stay_close(tmp_path: Path, dtype: str) -> None:
    folder = save_model("qwen3", tmp_path)
    wide = make_runner(ModelFiles("hf", folder), block_size=BLOCK)
    narrow = make_runner(ModelFiles("hf", folder), block_size=BLOCK, dtype=dtype)
    oracle = load_oracle(folder, getattr(torch, dtype))
    for length in (5, 40):
        prompt = prompt_of(length)
        batch = Batch((Row("s", prompt, 0, scattered_blocks(wide, length), SampleSpec(GREEDY, 0, 0)),))
        truth = wide.logits(batch)[0]
        with torch.inference_mode():
            theirs = (oracle(torch.tensor([prompt])).logits[0, -1].float() - truth).abs().max()
        assert (narrow.logits(batch)[0] - truth).abs().max() <= 2 * theirs
    await wide.close()
    await narrow.close()


@pytest.mark.model
@pytest.mark.nightly
@pytest.mark.filterwarnings("default")
async def test_the_real_model_errs_at_most_twice_as_much_as_transformers() -> None:
    pytest.importorskip("accelerate", reason="transformers needs accelerate to read GGUF files")
    files = require_default_model()
    oracle = load_oracle(files.path.parent, gguf_file=files.path.name)
    exact = load_oracle(files.path.parent, torch.float64, gguf_file=files.path.name)
    runner = make_runner(files, block_size=16, layer_group=5)
    ours = theirs = 0.0
    for length in (1, 15, 16, 17, 100, 700):
        prompt = prompt_of(length, vocab_size=49_152)
        with torch.inference_mode():
            truth = exact(torch.tensor([prompt])).logits[0, -1]
            theirs = max(theirs, (oracle(torch.tensor([prompt])).logits[0, -1] - truth).abs().max().item())
        blocks = scattered_blocks(runner, length)
        for start in range(0, length, 512):
            row = Row("s", prompt[start : start + 512], start, blocks, SampleSpec(GREEDY, 0, 0))
            logits = runner.logits(Batch((row,)))[0]
        ours = max(ours, (logits - truth).abs().max().item())
    assert ours <= 2 * theirs
    await runner.close()
