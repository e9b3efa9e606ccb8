"""Puts one worker's engine together: files → config and weights → model, KV cache, sampler → runner.

A worker of several ranks is one such engine in each rank's process, over its share of the weights: `load_engine` on the
leader, `load_follower` on the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import blake2b
from importlib.util import find_spec
from typing import Literal

import torch

from engine.batch import KVLayout
from engine.config import EngineConfig
from engine.device_runner import DeviceRunner
from engine.errors import ConfigError
from engine.kv_cache import DTYPES, KVCache, count_blocks
from engine.model_config import ModelConfig
from engine.model_source import ModelFiles
from engine.parallel_model import ParallelModel
from engine.parallel_runner import LeaderRunner, ParallelRunner
from engine.rank_follower import RankFollower
from engine.ranks import Ranks
from engine.runners import make_runner
from engine.sampler import Sampler
from engine.shard import Shard, local_config, shards
from engine.structure import Guide
from engine.tokenizer import load as load_tokenizer
from engine.torch_runner import TorchRunner
from engine.weights import Weights, load_weights, open_weights
from kernels.choice import Kernels, choose_kernels

# Not part of what a model computes from the same tokens: two workers may differ in these.
NOT_IN_FINGERPRINT = ("name", "max_context", "eos_token_ids")


@dataclass(frozen=True, slots=True)
class Engine:
    """One worker's model, loaded, and the runner that executes it. `runner.layout` says what came of the config."""

    model: ModelConfig
    runner: TorchRunner | DeviceRunner | ParallelRunner
    files: ModelFiles


def load_engine(config: EngineConfig, files: ModelFiles, ranks: Ranks | None = None) -> Engine:
    """Loads weights and allocates the KV cache: seconds to minutes. Raises ModelFileError or ConfigError.

    `ranks`, not joined yet: where the config asks for several; this waits for them all. Then also raises RankLost.
    """
    if config.ranks > 1:
        if ranks is None:
            field = "tensor_parallel" if config.tensor_parallel > 1 else "pipeline_parallel"
            raise ConfigError(f"{field}: got {getattr(config, field)}, expected 1 where a single process does it all")
        share = load_share(config, files, ranks)
        local = LeaderRunner(
            share.model,
            share.cache,
            Sampler(share.config.vocab_size, share.config.eos_token_ids, open_guide(share.config, files)),
            ranks,
            device=share.device,
            layer_group=config.layer_group,
            bind=share.bind,
        )
        ranks.join(share.identity, share.device)
        return Engine(share.config, ParallelRunner(share.layout, share.shards, local, ranks), files)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    source = open_weights(files)
    model = source.config
    # Before the weights are read: a pool that cannot be had should be known at once.
    num_blocks = count_blocks(model, config.kv_cache_bytes, config.block_size, kv_dtype(config, dtype))
    weights = load_weights(source, DTYPES[dtype], device)
    guide = open_guide(model, files)
    return Engine(model, build_runner(config, model, weights, num_blocks, dtype, device, guide), files)


def open_guide(model: ModelConfig, files: ModelFiles) -> Guide | None:
    """What holds answers to a structure, made beside the rest; None where nothing can: without llguidance, or for a
    model whose answers nothing ends."""
    if not model.eos_token_ids or find_spec("llguidance") is None:
        return None
    from engine.guidance import Guides, LazyGuides

    return LazyGuides(lambda: Guides(load_tokenizer(files), model.vocab_size, model.eos_token_ids))


def check_ranks(config: EngineConfig, files: ModelFiles) -> None:
    """Raises ConfigError when the model cannot be split as asked for: cheap, and before any other rank is started."""
    shards(open_weights(files).config, config.tensor_parallel, config.pipeline_parallel)


def load_follower(config: EngineConfig, files: ModelFiles, ranks: Ranks) -> RankFollower:
    """Loads the share of a rank that is not the leader, and waits for all ranks. Raises as `load_engine`."""
    share = load_share(config, files, ranks)
    runner = TorchRunner(
        share.model,
        share.cache,
        Sampler(share.config.vocab_size, share.config.eos_token_ids),
        device=share.device,
        layer_group=config.layer_group,
    )
    ranks.join(share.identity, share.device)
    return RankFollower(runner, share.model, ranks, device=share.device, bind=share.bind)


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """What one rank of several has loaded. `config` and `layout` are the whole worker's."""

    config: ModelConfig
    layout: KVLayout
    shards: tuple[Shard, ...]
    model: ParallelModel
    cache: KVCache
    device: torch.device
    bind: Callable[[], None]

    @property
    def identity(self) -> str:
        """What all ranks must have in common."""
        return (
            f"{self.layout.model}, {self.layout.num_blocks} blocks of {self.layout.block_size} in {self.layout.dtype}"
        )


def load_share(config: EngineConfig, files: ModelFiles, ranks: Ranks) -> Share:
    """Loads one rank's share of the weights and allocates its share of the KV cache."""
    rank = ranks.member.rank
    device = choose_device(config.device, rank)
    dtype = choose_dtype(config.dtype, device)
    source = open_weights(files)
    model = source.config
    split = shards(model, config.tensor_parallel, config.pipeline_parallel)
    configs = [local_config(model, shard) for shard in split]
    # Blocks have the same ids on all ranks, so there are as many as fit where a block is largest.
    in_cache = kv_dtype(config, dtype)
    num_blocks = min(count_blocks(each, config.kv_cache_bytes, config.block_size, in_cache) for each in configs)
    weights = load_weights(source, DTYPES[dtype], device, split[rank])
    layout = make_layout(config, model, fingerprint(model, weights), num_blocks, dtype)
    kernels = kernels_for(config, device, dtype)
    threads = config.threads or (max(1, torch.get_num_threads() // config.ranks) if device.type == "cpu" else 0)
    local = replace(layout, num_layers=configs[rank].num_layers, num_kv_heads=configs[rank].num_kv_heads)
    return Share(
        config=model,
        layout=layout,
        shards=split,
        model=ParallelModel(model, weights, kernels, ranks, split),
        cache=KVCache(local, device, kernels.ops),
        device=device,
        bind=partial(kernels.bind, threads, config.cpus[rank :: config.ranks]),
    )


def build_runner(
    config: EngineConfig,
    model: ModelConfig,
    weights: Weights,
    num_blocks: int,
    dtype: str,
    device: torch.device,
    guide: Guide | None = None,
) -> TorchRunner | DeviceRunner:
    """A runner over weights that are already in memory, real or random."""
    kernels = kernels_for(config, device, dtype)
    return make_runner(
        model,
        weights,
        kernels,
        make_layout(config, model, fingerprint(model, weights), num_blocks, dtype),
        device,
        layer_group=config.layer_group,
        bind=partial(kernels.bind, config.threads, config.cpus),
        graph_rows=config.graph_rows,
        graph_chunks=config.graph_chunks,
        guide=guide,
    )


def kernels_for(config: EngineConfig, device: torch.device, dtype: str) -> Kernels:
    """Raises ConfigError for a weight format that the device does not take."""
    try:
        return choose_kernels(device, DTYPES[dtype], config.weight_format, config.kernels)
    except ValueError as error:
        raise ConfigError(f"weight_format: got {config.weight_format!r}, {error}") from error


def make_layout(config: EngineConfig, model: ModelConfig, name: str, num_blocks: int, dtype: str) -> KVLayout:
    """The layout of a whole worker's cache."""
    return KVLayout(
        model=name,
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        dtype=kv_dtype(config, dtype),
        block_size=config.block_size,
        num_blocks=num_blocks,
    )


def fingerprint(model: ModelConfig, weights: Weights) -> str:
    """Names what a model computes: two workers may exchange KV only when theirs are equal.

    Covers the config's numbers and a sample of every weight matrix as stored; the dtype it was loaded in is left out.
    """
    numbers = {key: value for key, value in sorted(asdict(model).items()) if key not in NOT_IN_FINGERPRINT}
    digest = blake2b(repr(numbers).encode() + weights.digest.encode(), digest_size=8)
    return f"{model.architecture}-{digest.hexdigest()}"


def choose_device(wanted: Literal["auto", "cpu", "cuda"], rank: int = 0) -> torch.device:
    """The device of a rank: of those that its process sees, the ranks of one machine take one after another."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: got 'cuda', expected 'cpu' or 'auto': torch finds no CUDA device here")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", rank % torch.cuda.device_count()) if rank else torch.device("cuda")


def kv_dtype(config: EngineConfig, dtype: str) -> str:
    """The cache's dtype, by a name of `engine/kv_cache.py`."""
    return dtype if config.kv_dtype == "auto" else config.kv_dtype


def choose_dtype(wanted: str, device: torch.device) -> str:
    """The name of a dtype in `engine/kv_cache.py`. float32 on CPU: most have no fast half-width arithmetic."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if device.type == "cuda" else "float32"
