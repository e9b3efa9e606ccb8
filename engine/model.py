"""The Llama family's forward pass over a paged KV cache: Llama, Qwen2 (q, k, v biases), Qwen3 (q, k norms), Mistral
(sliding window).

Layers are called in groups, so that a caller can publish the KV of one group while the next runs:

    hidden = model.embed(token_ids)
    hidden = model.layers(hidden, range(0, 5), batch, kv)     and so on
    logits = model.logits(hidden, tokens)                     only of the tokens that are sampled from

A rank of several computes with its share of every matrix (engine/parallel_model.py): only the sums after o and down,
which `Collective` makes, tell it that there are others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from engine.model_config import ModelConfig
from engine.rope import rope_table
from engine.weight_parts import Weights
from kernels.attention_batch import AttentionBatch
from kernels.attention_variant import AttentionVariant
from kernels.choice import Kernels
from kernels.linear import Linear


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """One layer, by the names and shapes that `engine/weight_parts.py` lists."""

    attn_norm: torch.Tensor
    qkv: Linear
    o: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None


class Collective(Protocol):
    """The ranks that split the same layers."""

    def all_reduce(self, x: torch.Tensor) -> None:
        """Replaces x, contiguous, by its sum over all ranks."""
        ...


class SummedLinear:
    """A Linear of which every rank holds some of the columns: the product is the sum of theirs."""

    def __init__(self, linear: Linear, ranks: Collective) -> None:
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight_bytes = linear.weight_bytes
        self._linear, self._ranks = linear, ranks

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        product = self._linear(x)
        self._ranks.all_reduce(product)
        return product


# What flows between layers: the last block's output, and the sum of all before it. Each norm adds the two in passing.
Hidden = tuple[torch.Tensor, torch.Tensor | None]


class Model:
    """Holds weights and the table of rotary angles; keeps no state between calls.

    Takes the tensors out of `weights`: matrices are repacked one by one, and two copies of all would not fit.
    `ranks`: those that hold the rest of each matrix, where the weights are a share.
    """

    def __init__(
        self, config: ModelConfig, weights: Weights, kernels: Kernels, ranks: Collective | None = None
    ) -> None:
        self.config = config
        self.vocab_size = config.vocab_size
        self._ops = kernels.ops
        tensors = weights.tensors
        # A stage of several may lack what only the first or the last one needs.
        self._embed, self._norm = tensors.pop("embed", None), tensors.pop("norm", None)
        pack_head = kernels.pack_head or kernels.pack
        self._head = pack_head(tensors.pop("head"), None) if "head" in tensors else None
        self._layers = [_take_layer(tensors, layer, kernels, ranks) for layer in range(config.num_layers)]
        device = self._layers[0].attn_norm.device
        self._table = rope_table(config, device, tensors.pop("rope_factors", None))
        scale = config.head_dim**-0.5
        self._variants = [AttentionVariant(scale, config.window(layer)) for layer in range(config.num_layers)]

    def embed(self, token_ids: torch.Tensor) -> Hidden:
        """token_ids [tokens] int64 → [tokens, hidden]."""
        assert self._embed is not None, "only the first stage embeds"
        return self._ops.take_rows(self._embed, token_ids), None

    def layers(self, hidden: Hidden, layers: range, batch: AttentionBatch, kv: torch.Tensor) -> Hidden:
        """Runs some layers; afterwards their KV of all tokens of the batch is in the cache.

        kv [num_layers, num_blocks, 2, block_size, kv_heads, head_dim].
        """
        for layer in layers:
            hidden = self._layer(hidden, layer, batch, kv[layer])
        return hidden

    def logits(self, hidden: Hidden, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [n, vocab] in the model's dtype at `tokens` [n], indices into the batch."""
        assert self._norm is not None, "only the last stage has logits"
        assert self._head is not None, "only the last stage has logits"
        ops, (output, residual) = self._ops, hidden
        picked = None if residual is None else ops.take_rows(residual, tokens)
        normed, _ = ops.rms_norm(ops.take_rows(output, tokens), self._norm, self.config.rms_norm_eps, picked)
        return self._head(normed)

    def _layer(self, hidden: Hidden, layer: int, batch: AttentionBatch, kv_layer: torch.Tensor) -> Hidden:
        ops, weights, eps = self._ops, self._layers[layer], self.config.rms_norm_eps
        normed, residual = ops.rms_norm(hidden[0], weights.attn_norm, eps, hidden[1])
        q, k, v = self._qkv(normed, weights)
        q = ops.rope_store(q, k, v, batch.positions, self._table, kv_layer, batch.slots)
        attended, _ = ops.paged_attention(q, kv_layer, batch, self._variants[layer])
        normed, residual = ops.rms_norm(weights.o(attended.flatten(1)), weights.mlp_norm, eps, residual)
        return weights.down(ops.silu_mul(weights.gate_up(normed))), residual

    def _qkv(self, normed: torch.Tensor, weights: LayerWeights) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim], not rotated yet."""
        config = self.config
        heads = weights.qkv(normed).view(normed.shape[0], -1, config.head_dim)
        q, k, v = torch.split(heads, [config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        if weights.q_norm is not None and weights.k_norm is not None:
            q, _ = self._ops.rms_norm(q, weights.q_norm, config.rms_norm_eps)
            k, _ = self._ops.rms_norm(k, weights.k_norm, config.rms_norm_eps)
        return q, k, v


def _take_layer(
    tensors: dict[str, torch.Tensor], layer: int, kernels: Kernels, ranks: Collective | None
) -> LayerWeights:
    def take(key: str) -> torch.Tensor | None:
        return tensors.pop(f"layers.{layer}.{key}", None)

    def pack(key: str) -> Linear:
        return kernels.pack(tensors.pop(f"layers.{layer}.{key}"), take(f"{key}_bias"))

    def pack_summed(key: str) -> Linear:
        return pack(key) if ranks is None else SummedLinear(pack(key), ranks)

    return LayerWeights(
        attn_norm=tensors.pop(f"layers.{layer}.attn_norm"),
        qkv=pack("qkv"),
        o=pack_summed("o"),
        mlp_norm=tensors.pop(f"layers.{layer}.mlp_norm"),
        gate_up=pack("gate_up"),
        down=pack_summed("down"),
        q_norm=take("q_norm"),
        k_norm=take("k_norm"),
    )
