"""Which part of a model each rank of a worker holds. Plain Python on plain values.

    pipeline rank  0    embed, layers 0 … 15          tensor ranks split every matrix of these layers,
                   1    layers 16 … 31, norm, head    and the vocabulary's rows of the head

rank = pipeline rank · tensor_parallel + tensor rank. The split is Megatron-LM's (https://arxiv.org/abs/1909.08053): q,
k, v and gate, up by rows, o and down by columns, so that a layer needs two sums over the tensor ranks and nothing else.
Shares need not be equal: 3 KV heads on 2 ranks are 2 and 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

from engine.errors import ConfigError
from engine.model_config import ModelConfig

# Shares of the FFN end on multiples of this where its width does: whole quantisation groups, whole vector registers.
COLUMN_UNIT = 64


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's share, in the whole model's numbering. With more tensor ranks than KV heads several hold the same."""

    layers: range
    heads: range
    kv_heads: range
    columns: range  # of the FFN's intermediate size
    vocab: range  # rows of the output head
    is_last: bool

    @property
    def is_first(self) -> bool:
        return self.layers.start == 0


def shards(model: ModelConfig, tensor_parallel: int, pipeline_parallel: int) -> tuple[Shard, ...]:
    """The shares of all ranks, by rank. Raises ConfigError naming the field that asks for more than there is."""
    if pipeline_parallel > model.num_layers:
        raise ConfigError(
            f"pipeline_parallel: got {pipeline_parallel}, expected at most {model.num_layers}: "
            f"{model.name} has no more layers"
        )
    most = min(model.num_heads, model.intermediate_size, model.vocab_size)
    if tensor_parallel > most:
        raise ConfigError(
            f"tensor_parallel: got {tensor_parallel}, expected at most {most}: {model.name} has {model.num_heads} "
            f"attention heads and an FFN of {model.intermediate_size}"
        )
    heads = _split_heads(model, tensor_parallel)
    unit = math.gcd(model.intermediate_size, COLUMN_UNIT)
    while model.intermediate_size // unit < tensor_parallel:
        unit //= 2
    columns = [
        range(units.start * unit, units.stop * unit)
        for units in _spread(range(model.intermediate_size // unit), tensor_parallel)
    ]
    vocab = _spread(range(model.vocab_size), tensor_parallel)
    return tuple(
        Shard(layers, *heads[rank], columns[rank], vocab[rank], layers.stop == model.num_layers)
        for layers in _spread(range(model.num_layers), pipeline_parallel)
        for rank in range(tensor_parallel)
    )


def whole(model: ModelConfig) -> Shard:
    """The share of a worker that is one rank."""
    return shards(model, 1, 1)[0]


def local_config(model: ModelConfig, shard: Shard) -> ModelConfig:
    """The config of the model that one rank computes, its layers numbered from 0."""
    return replace(
        model,
        num_layers=len(shard.layers),
        num_heads=len(shard.heads),
        num_kv_heads=len(shard.kv_heads),
        intermediate_size=len(shard.columns),
        window_from_layer=max(0, model.window_from_layer - shard.layers.start),
    )


def _split_heads(model: ModelConfig, ranks: int) -> list[tuple[range, range]]:
    """(query heads, KV heads) of each tensor rank: whole groups while there is one for each rank, else parts of one."""
    group = model.num_heads // model.num_kv_heads
    if ranks <= model.num_kv_heads:
        return [(range(kv.start * group, kv.stop * group), kv) for kv in _spread(range(model.num_kv_heads), ranks)]
    sharers = _spread(range(ranks), model.num_kv_heads)
    return [
        (heads, range(kv_head, kv_head + 1))
        for kv_head, some in enumerate(sharers)
        for heads in _spread(range(kv_head * group, (kv_head + 1) * group), len(some))
    ]


def _spread(items: range, parts: int) -> list[range]:
    """Cuts a range into so many, their lengths at most one apart."""
    bounds = [items.start + -(-len(items) * part // parts) for part in range(parts + 1)]
    return [range(first, end) for first, end in pairwise(bounds)]
