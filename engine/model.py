"""The Llama family's forward pass over a paged KV cache: Llama, Qwen2 (q, k, v biases), Qwen3 (q, k norms), Mistral
(sliding window).

Layers are called in groups, so that a caller can publish the KV of one group while the next runs:

    hidden = model.embed(token_ids)
    hidden = model.layers(hidden, range(0, 5), batch, kv)     and so on
    logits = model.logits(hidden, tokens)                     only of the tokens that are sampled from
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as functional

from engine.model_config import ModelConfig
from engine.rope import rope_table
from engine.weights import Weights
from kernels import ops
from kernels.attention_batch import AttentionBatch


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """One layer, by the names and shapes that `engine/weights.py` lists."""

    attn_norm: torch.Tensor
    qkv: torch.Tensor
    o: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    qkv_bias: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None


# What flows between layers: the last block's output, and the sum of all before it. Each norm adds the two in passing.
Hidden = tuple[torch.Tensor, torch.Tensor | None]


class Model:
    """Holds weights and the table of rotary angles; keeps no state between calls."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        tensors = weights.tensors
        self._embed, self._norm, self._head = tensors["embed"], tensors["norm"], tensors["head"]
        self._layers = [_layer_weights(tensors, layer) for layer in range(config.num_layers)]
        self._table = rope_table(config, self._embed.device, tensors.get("rope_factors"))
        self._scale = config.head_dim**-0.5

    def embed(self, token_ids: torch.Tensor) -> Hidden:
        """token_ids [tokens] int64 → [tokens, hidden]."""
        return functional.embedding(token_ids, self._embed), None

    def layers(self, hidden: Hidden, layers: range, batch: AttentionBatch, kv: torch.Tensor) -> Hidden:
        """Runs some layers; afterwards their KV of all tokens of the batch is in the cache.

        kv [num_layers, num_blocks, 2, block_size, kv_heads, head_dim].
        """
        for layer in layers:
            hidden = self._layer(hidden, layer, batch, kv[layer])
        return hidden

    def logits(self, hidden: Hidden, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [n, vocab] in float32 at `tokens` [n], indices into the batch."""
        output, residual = hidden
        picked = None if residual is None else residual.index_select(0, tokens)
        normed, _ = ops.rms_norm(output.index_select(0, tokens), self._norm, self.config.rms_norm_eps, picked)
        return functional.linear(normed, self._head).float()

    def _layer(self, hidden: Hidden, layer: int, batch: AttentionBatch, kv_layer: torch.Tensor) -> Hidden:
        weights, eps = self._layers[layer], self.config.rms_norm_eps
        normed, residual = ops.rms_norm(hidden[0], weights.attn_norm, eps, hidden[1])
        q, k, v = self._qkv(normed, weights, batch)
        ops.store_kv(k, v, kv_layer, batch.slots)
        attended, _ = ops.paged_attention(q, k, v, kv_layer, batch, self._scale, self.config.window(layer))
        output = functional.linear(attended.flatten(1), weights.o)
        normed, residual = ops.rms_norm(output, weights.mlp_norm, eps, residual)
        output = functional.linear(ops.silu_mul(functional.linear(normed, weights.gate_up)), weights.down)
        return output, residual

    def _qkv(
        self, normed: torch.Tensor, weights: LayerWeights, batch: AttentionBatch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim], q and k rotated."""
        config = self.config
        heads = functional.linear(normed, weights.qkv, weights.qkv_bias).view(normed.shape[0], -1, config.head_dim)
        q, k, v = torch.split(heads, [config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        if weights.q_norm is not None and weights.k_norm is not None:
            q, _ = ops.rms_norm(q, weights.q_norm, config.rms_norm_eps)
            k, _ = ops.rms_norm(k, weights.k_norm, config.rms_norm_eps)
        q, k = ops.rope(q, k, batch.positions, self._table)
        return q, k, v


def _layer_weights(tensors: dict[str, torch.Tensor], layer: int) -> LayerWeights:
    prefix = f"layers.{layer}."
    return LayerWeights(**{key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)})
