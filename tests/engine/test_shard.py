"""Which part of a model each rank holds: everything once, in whole heads, and what cannot be split is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.model_config import ModelConfig
from engine.model_source import ModelFiles
from engine.shard import Shard, local_config, shards, whole
from engine.weights import load_weights, open_weights
from tests.tiny_models import CONFIGS, save_model

SMOLLM2 = ModelConfig("llama", "smollm2", 30, 576, 1536, 9, 3, 64, 49152, 8192, 10000.0, 1e-5)
LLAMA_8B = ModelConfig("llama", "llama", 32, 4096, 14336, 32, 8, 128, 128256, 8192, 500000.0, 1e-5)
CPU = torch.device("cpu")


def test_shares_need_not_be_equal() -> None:
    first, second = shards(SMOLLM2, 2, 1)
    assert (first.heads, first.kv_heads, first.columns) == (range(6), range(2), range(768))
    assert (second.heads, second.kv_heads, second.columns) == (range(6, 9), range(2, 3), range(768, 1536))
    assert (second.vocab, second.layers) == (range(24576, 49152), range(30))


def test_stages_take_runs_of_layers() -> None:
    split = shards(LLAMA_8B, 2, 2)
    assert [shard.layers for shard in split] == [range(16), range(16), range(16, 32), range(16, 32)]
    assert [shard.is_first for shard in split] == [True, True, False, False]
    assert [shard.is_last for shard in split] == [False, False, True, True]
    assert split[1].heads == split[3].heads == range(16, 32)


def test_more_ranks_than_kv_heads_share_one() -> None:
    split = shards(LLAMA_8B, 12, 1)
    assert [shard.kv_heads.start for shard in split] == [0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7]
    assert [len(shard.heads) for shard in split] == [2, 2, 4] * 4


def test_ffn_shares_are_whole_quantisation_groups() -> None:
    assert all(len(shard.columns) % 64 == 0 for tp in (2, 3, 4, 7, 8) for shard in shards(SMOLLM2, tp, 1))


@given(
    kv_heads=st.integers(1, 6),
    group=st.integers(1, 5),
    columns=st.integers(8, 300),
    layers=st.integers(1, 9),
    tensor=st.integers(1, 8),
    pipeline=st.integers(1, 9),
)
def test_everything_is_held_once(
    kv_heads: int, group: int, columns: int, layers: int, tensor: int, pipeline: int
) -> None:
    heads = kv_heads * group
    model = replace(
        SMOLLM2, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, intermediate_size=columns, vocab_size=97
    )
    if tensor > heads or pipeline > layers:
        with pytest.raises(ConfigError, match="_parallel: got"):
            shards(model, tensor, pipeline)
        return
    split = shards(model, tensor, pipeline)
    assert len(split) == tensor * pipeline
    assert [layer for shard in split[::tensor] for layer in shard.layers] == list(range(layers))
    for stage in range(pipeline):
        ranks = split[stage * tensor : (stage + 1) * tensor]
        assert len({shard.layers for shard in ranks}) == 1
        assert [head for shard in ranks for head in shard.heads] == list(range(heads))
        assert [column for shard in ranks for column in shard.columns] == list(range(columns))
        assert [row for shard in ranks for row in shard.vocab] == list(range(97))
        assert {head for shard in ranks for head in shard.kv_heads} == set(range(kv_heads))
        for shard in ranks:
            # Query head h of the whole model reads KV head h // group; so it must be on the rank, counted locally.
            each = len(shard.heads) // len(shard.kv_heads)
            readers = [shard.kv_heads[local // each] for local in range(len(shard.heads))]
            assert readers == [head // group for head in shard.heads]


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel: got 10, expected at most 9: smollm2 has 9 attention heads"):
        shards(SMOLLM2, 10, 1)
    with pytest.raises(ConfigError, match="pipeline_parallel: got 31, expected at most 30"):
        shards(SMOLLM2, 1, 31)


def test_windows_keep_their_layers() -> None:
    model = replace(SMOLLM2, sliding_window=7, window_from_layer=20)
    first, second, third = (local_config(model, shard) for shard in shards(model, 1, 3))
    assert [first.window(layer) for layer in (0, 9)] == [None, None]
    assert [second.window(layer) for layer in (0, 9)] == [None, None]
    assert [third.window(layer) for layer in (0, 9)] == [7, 7]
    model = replace(model, window_from_layer=12)
    assert [local_config(model, shards(model, 1, 3)[1]).window(layer) for layer in (1, 2)] == [None, 7]


@pytest.mark.parametrize("variant", CONFIGS)
def test_shares_of_the_weights_make_the_whole(variant: str, tmp_path: Path) -> None:
    source = open_weights(ModelFiles("hf", save_model(variant, tmp_path)))
    model = source.config
    everything = load_weights(source, torch.float32, CPU)
    # Its own KV head for each rank, so that shares lie side by side.
    tensor = min(2, model.num_kv_heads)
    split = shards(model, tensor, 2)
    loaded = [load_weights(source, torch.float32, CPU, shard) for shard in split]
    assert {weights.digest for weights in loaded} == {everything.digest}
    for stage, layer in ((0, 0), (1, 1)):
        ranks = range(stage * tensor, (stage + 1) * tensor)
        of = [loaded[rank].tensors for rank in ranks]
        full = {key: everything.tensors[f"layers.{layer}.{key}"] for key in ("qkv", "o", "gate_up", "down")}
        assert torch.equal(torch.cat([tensors["layers.0.o"] for tensors in of], 1), full["o"])
        assert torch.equal(torch.cat([tensors["layers.0.down"] for tensors in of], 1), full["down"])
        gates, ups = zip(*(tensors["layers.0.gate_up"].chunk(2) for tensors in of), strict=True)
        assert torch.equal(torch.cat((*gates, *ups)), full["gate_up"])
        cuts = [[len(split[rank].heads), *[len(split[rank].kv_heads)] * 2] for rank in ranks]
        pieces = [
            tensors["layers.0.qkv"].split([count * model.head_dim for count in cut])
            for tensors, cut in zip(of, cuts, strict=True)
        ]
        assert torch.equal(torch.cat([piece[part] for part in range(3) for piece in pieces]), full["qkv"])
        assert all(tensors["layers.0.attn_norm"] is not None for tensors in of)
        assert ("embed" in of[0]) == (stage == 0)
        assert ("norm" in of[0]) == ("head" in of[0]) == (stage == 1)
    assert torch.equal(torch.cat([weights.tensors["head"] for weights in loaded[tensor:]]), everything.tensors["head"])


def test_a_worker_of_one_rank_holds_all() -> None:
    assert whole(SMOLLM2) == Shard(range(30), range(9), range(3), range(1536), range(49152), True)
