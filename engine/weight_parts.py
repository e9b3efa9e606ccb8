"""What tensors a model is made of, under one set of names; needs torch alone, and no file.

    embed                     [vocab, hidden]
    layers.I.attn_norm        [hidden]
    layers.I.qkv              [(heads + 2 * kv_heads) * head_dim, hidden]    q, k, v rows one after another
    layers.I.qkv_bias         [(heads + 2 * kv_heads) * head_dim]            where config.qkv_bias
    layers.I.q_norm, k_norm   [head_dim]                                     where config.qk_norm
    layers.I.o                [hidden, heads * head_dim]
    layers.I.mlp_norm         [hidden]
    layers.I.gate_up          [2 * intermediate, hidden]                     gate rows, then up rows
    layers.I.down             [hidden, intermediate]
    norm                      [hidden]
    head                      [vocab, hidden]                                the very tensor `embed` when tied
    rope_factors              [head_dim / 2], float32                        where rope_scaling.kind is "factors"

q, k, v and gate, up are stored fused, because one wide matrix product beats three narrow ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class Weights:
    """`tensors` by the names above. `digest` samples every matrix as stored in the file, so it is the same for every
    dtype the file is loaded in."""

    tensors: dict[str, torch.Tensor]
    digest: str


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a file. `rotary_heads`: how many heads its rows are, for q and k."""

    key: str
    shape: tuple[int, ...]
    rotary_heads: int = 0


def random_weights(config: ModelConfig, dtype: torch.dtype, seed: int, device: torch.device) -> Weights:
    """Weights of the right shapes and a sane scale, for tests and benchmarks of speed without a model file."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for key, parts in expected_parts(config).items():
        target = empty(key, [part.shape for part in parts], dtype, device)
        if key.endswith("norm") or key == "rope_factors":
            target.fill_(1.0)
        else:
            target.normal_(0.0, target.shape[-1] ** -0.5 if target.dim() > 1 else 0.02, generator=generator)
        tensors[key] = target
    if config.tie_embeddings:
        tensors["head"] = tensors["embed"]
    return Weights(tensors, f"random-{seed}")


def expected_parts(config: ModelConfig) -> dict[str, tuple[Part, ...]]:
    """Every canonical tensor (but a tied `head`), and the file tensors that are stacked by rows to make it."""
    hidden, head_dim, intermediate = config.hidden_size, config.head_dim, config.intermediate_size
    q_rows, kv_rows = config.num_heads * head_dim, config.num_kv_heads * head_dim
    expected: dict[str, tuple[Part, ...]] = {"embed": (Part("embed", (config.vocab_size, hidden)),)}
    for layer in range(config.num_layers):
        at = f"layers.{layer}."
        expected[at + "attn_norm"] = (Part(at + "attn_norm", (hidden,)),)
        expected[at + "qkv"] = (
            Part(at + "q", (q_rows, hidden), config.num_heads),
            Part(at + "k", (kv_rows, hidden), config.num_kv_heads),
            Part(at + "v", (kv_rows, hidden)),
        )
        if config.qkv_bias:
            expected[at + "qkv_bias"] = (
                Part(at + "q_bias", (q_rows,), config.num_heads),
                Part(at + "k_bias", (kv_rows,), config.num_kv_heads),
                Part(at + "v_bias", (kv_rows,)),
            )
        if config.qk_norm:
            expected[at + "q_norm"] = (Part(at + "q_norm", (head_dim,)),)
            expected[at + "k_norm"] = (Part(at + "k_norm", (head_dim,)),)
        expected[at + "o"] = (Part(at + "o", (hidden, q_rows)),)
        expected[at + "mlp_norm"] = (Part(at + "mlp_norm", (hidden,)),)
        expected[at + "gate_up"] = (
            Part(at + "gate", (intermediate, hidden)),
            Part(at + "up", (intermediate, hidden)),
        )
        expected[at + "down"] = (Part(at + "down", (hidden, intermediate)),)
    expected["norm"] = (Part("norm", (hidden,)),)
    if not config.tie_embeddings:
        expected["head"] = (Part("head", (config.vocab_size, hidden)),)
    if config.rope_scaling.kind == "factors":
        expected["rope_factors"] = (Part("rope_factors", (head_dim // 2,)),)
    return expected


def empty(key: str, shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory for one tensor of Weights, stacked by rows from parts of these shapes."""
    rows = sum(shape[0] for shape in shapes)
    # Rotary angles reach thousands of radians: in 16 bits they would be noise.
    dtype = torch.float32 if key == "rope_factors" else dtype
    return torch.empty((rows, *shapes[0][1:]), dtype=dtype, device=device)
