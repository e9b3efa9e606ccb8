"""Puts one worker's engine together: files → config and weights → model, KV cache, sampler → runner."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Literal

import torch

from engine.batch import KVLayout
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.kv_cache import DTYPES, KVCache, count_blocks
from engine.model import Model
from engine.model_config import ModelConfig
from engine.model_source import ModelFiles
from engine.sampler import Sampler
from engine.torch_runner import TorchRunner
from engine.weights import Weights, load_weights, open_weights
from kernels.choice import choose_kernels

# Not part of what a model computes from the same tokens: two workers may differ in these.
NOT_IN_FINGERPRINT = ("name", "max_context", "eos_token_ids")


@dataclass(frozen=True, slots=True)
class Engine:
    """One worker's model, loaded, and the runner that executes it. `runner.layout` says what came of the config."""

    model: ModelConfig
    runner: TorchRunner
    files: ModelFiles


def load_engine(config: EngineConfig, files: ModelFiles) -> Engine:
    """Loads weights and allocates the KV cache: seconds to minutes. Raises ModelFileError or ConfigError."""
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    source = open_weights(files)
    model = source.config
    # Before the weights are read: a pool that cannot be had should be known at once.
    num_blocks = count_blocks(model, config.kv_cache_bytes, config.block_size, dtype)
    weights = load_weights(source, DTYPES[dtype], device)
    return Engine(model, build_runner(config, model, weights, num_blocks, dtype, device), files)


def build_runner(
    config: EngineConfig, model: ModelConfig, weights: Weights, num_blocks: int, dtype: str, device: torch.device
) -> TorchRunner:
    """A runner over weights that are already in memory, real or random."""
    layout = KVLayout(
        model=fingerprint(model, weights),
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        dtype=dtype,
        block_size=config.block_size,
        num_blocks=num_blocks,
    )
    kernels = choose_kernels(device, DTYPES[dtype], config.weight_format, config.kernels)
    return TorchRunner(
        Model(model, weights, kernels),
        KVCache(layout, device, kernels.ops),
        Sampler(model.vocab_size, model.eos_token_ids),
        device=device,
        layer_group=config.layer_group,
        threads=config.threads,
    )


def fingerprint(model: ModelConfig, weights: Weights) -> str:
    """Names what a model computes: two workers may exchange KV only when theirs are equal.

    Covers the config's numbers and a sample of every weight matrix as stored; the dtype it was loaded in is left out.
    """
    numbers = {key: value for key, value in sorted(asdict(model).items()) if key not in NOT_IN_FINGERPRINT}
    digest = blake2b(repr(numbers).encode() + weights.digest.encode(), digest_size=8)
    return f"{model.architecture}-{digest.hexdigest()}"


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: got 'cuda', expected 'cpu' or 'auto': torch finds no CUDA device here")
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(wanted)


def choose_dtype(wanted: str, device: torch.device) -> str:
    """The name of a dtype in `engine/kv_cache.py`. float32 on CPU: most have no fast half-width arithmetic."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if device.type == "cuda" else "float32"
