"""What a model's forward pass cannot do without: the bytes that a decode step reads, the operations of a prefill."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from engine.model_config import ModelConfig
from engine.weight_parts import expected_parts

# Bytes of a weight by format; 0: those of the dtype. Integers carry a float16 scale for each group of 32, and int4 a
# minimum as well.
MATRIX_BYTES = {"dense": 0.0, "int8": (32 + 2) / 32, "int4": (16 + 4) / 32}


@dataclass(frozen=True, slots=True)
class ModelWork:
    """`weight_bytes`: all that one step reads of the weights. `token_flops`: of one token's products with them, but
    for the head. `pair_flops`: of one token attending to one, in all layers."""

    weight_bytes: float
    kv_token_bytes: float
    token_flops: float
    pair_flops: float

    def decode_bytes(self, batch: int, context: float) -> float:
        """Of one step."""
        return self.weight_bytes + batch * context * self.kv_token_bytes

    def prefill_flops(self, tokens: int) -> float:
        """Of one prompt."""
        return tokens * self.token_flops + tokens * (tokens + 1) / 2 * self.pair_flops


def work_of(config: ModelConfig, element_bytes: int, weight_format: Literal["dense", "int8", "int4"]) -> ModelWork:
    """`element_bytes`: of an activation, a KV element and, when dense, a weight."""
    matrix_bytes = MATRIX_BYTES[weight_format] or element_bytes
    weight_bytes, products = 0.0, 0
    for key, parts in expected_parts(config).items():
        elements = sum(math.prod(part.shape) for part in parts)
        if key == "embed" and not config.tie_embeddings:
            # A step looks up one row for each sequence.
            continue
        is_matrix = len(parts[0].shape) == 2
        weight_bytes += elements * (matrix_bytes if is_matrix else element_bytes)
        if is_matrix and key not in ("embed", "head"):
            products += elements
    return ModelWork(
        weight_bytes=weight_bytes,
        kv_token_bytes=2 * config.num_layers * config.num_kv_heads * config.head_dim * element_bytes,
        token_flops=2 * products,
        pair_flops=4 * config.num_layers * config.num_heads * config.head_dim,
    )
