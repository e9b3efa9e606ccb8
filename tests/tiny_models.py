"""Tiny random models of every architecture, with odd sizes, as Hugging Face folders; and the loop that runs them.

Weights are drawn much wider than training would start with, biases and norms too: with the usual small values all
logits lie so close together that a wrong rotation or a lost bias would go unseen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from engine.batch import Batch, Row, Sampled, SampleSpec
from engine.config import EngineConfig
from engine.engine import build_runner
from engine.model_source import ModelFiles
from engine.sampling import SamplingParams
from engine.structure import Guide
from engine.torch_runner import TorchRunner
from engine.weights import load_weights, open_weights

COMMON = {"num_hidden_layers": 2, "vocab_size": 97, "max_position_embeddings": 160, "eos_token_id": None}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GREEDY = SamplingParams(temperature=0.0)


def _sizes(hidden: int, heads: int, kv_heads: int, intermediate: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
    }


# Every variant differs from the others in what its architecture may get wrong.
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**COMMON, **_sizes(60, 6, 2, 100), tie_word_embeddings=False),
    "llama3-rope-tied": LlamaConfig(
        **COMMON, **_sizes(36, 3, 1, 50), tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE
    ),
    "qwen2": Qwen2Config(**COMMON, **_sizes(56, 4, 1, 72), tie_word_embeddings=True),
    "qwen2-window": Qwen2Config(
        **COMMON,
        **_sizes(56, 4, 4, 72),
        tie_word_embeddings=False,
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=1,
    ),
    "qwen3": Qwen3Config(**COMMON, **_sizes(60, 8, 1, 44), head_dim=22, tie_word_embeddings=True),
    "mistral-window": MistralConfig(**COMMON, **_sizes(48, 8, 2, 80), tie_word_embeddings=False, sliding_window=9),
}


def save_model(variant: str, folder: Path, seed: int = 0) -> Path:
    """Writes config.json and model.safetensors of one variant into `folder`, which it returns."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[variant], dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(0.0, 1.5 * weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.5)
    model.save_pretrained(folder)
    return folder


def load_oracle(folder: Path, dtype: torch.dtype = torch.float32, gguf_file: str | None = None) -> torch.nn.Module:
    """The same folder, or a GGUF file in it, by transformers, with its plainest attention."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, gguf_file=gguf_file, attn_implementation="eager")
    return model.eval()


def greedy_by(oracle: torch.nn.Module, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """The oracle's own greedy continuation. Without a mask it would guess one, and take some tokens for padding."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    output = oracle.generate(ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0)
    return output[0, len(prompt) :].tolist()


def make_runner(
    files: ModelFiles,
    *,
    block_size: int = 4,
    num_blocks: int = 64,
    dtype: str = "float32",
    layer_group: int = 1,
    guide: Guide | None = None,
) -> TorchRunner:
    """A runner whose cache starts as NaN, so that any read of a slot nobody wrote shows."""
    config = EngineConfig(block_size=block_size, layer_group=layer_group, dtype=dtype, device="cpu")
    source = open_weights(files)
    cpu = torch.device("cpu")
    weights = load_weights(source, getattr(torch, dtype), cpu)
    runner = build_runner(config, source.config, weights, num_blocks, dtype, cpu, guide)
    poison(runner)
    return runner


def poison(runner: TorchRunner) -> None:
    """Overwrites all KV with NaN, as a peer would."""
    layout = runner.layout
    layers, block_ids = range(layout.num_layers), range(layout.num_blocks)
    blocks = torch.full(
        (len(layers), len(block_ids), 2, layout.block_size, layout.num_kv_heads, layout.head_dim),
        float("nan"),
        dtype=getattr(torch, layout.dtype),
    )
    payload = memoryview(blocks.flatten().view(torch.uint8).numpy().tobytes())
    runner.import_blocks(block_ids, 0, layers, layout.block_size, payload, layout.dtype)


def scattered_blocks(runner: TorchRunner, tokens: int) -> list[int]:
    """Blocks for so many tokens, from all over the pool and in no order."""
    layout = runner.layout
    count = -(-tokens // layout.block_size)
    return [(7 * index + 3) % layout.num_blocks for index in range(count)]


async def prefill(
    runner: TorchRunner, prompt: Sequence[int], block_ids: Sequence[int], chunk: int, spec: SampleSpec
) -> tuple[Sampled, ...]:
    """Runs a prompt in chunks of so many tokens and draws at its end."""
    for start in range(0, len(prompt), chunk):
        piece = prompt[start : start + chunk]
        last = start + len(piece) == len(prompt)
        output = await runner.run(Batch((Row("s", piece, start, block_ids, spec if last else None),)))
    return output.sampled[0]


async def generate(
    runner: TorchRunner,
    prompt: Sequence[int],
    max_tokens: int,
    chunk: int = 1 << 20,
    params: SamplingParams = GREEDY,
    seed: int = 0,
) -> list[int]:
    """The simplest loop there is: one sequence, its own blocks, no stop conditions."""
    block_ids = scattered_blocks(runner, len(prompt) + max_tokens)
    drawn = (await prefill(runner, prompt, block_ids, chunk, SampleSpec(params, seed, 0, prompt_ids=prompt)))[0]
    output_ids = [drawn.token_id]
    while len(output_ids) < max_tokens:
        spec = SampleSpec(params, seed, len(output_ids), (0,), prompt, tuple(output_ids))
        row = Row("s", output_ids[-1:], len(prompt) + len(output_ids) - 1, block_ids, spec)
        output_ids.append((await runner.run(Batch((row,)))).sampled[0][0].token_id)
    return output_ids


def prompt_of(length: int, vocab_size: int = 97) -> list[int]:
    """A prompt of so many tokens, the same every time, unlike the prompts of other lengths."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, vocab_size, (length,), generator=generator).tolist()
