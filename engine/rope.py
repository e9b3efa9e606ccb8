"""The table of rotary angles, computed once per model."""

from __future__ import annotations

import math

import torch

from engine.model_config import ModelConfig, RopeScaling


def rope_table(config: ModelConfig, device: torch.device, factors: torch.Tensor | None = None) -> torch.Tensor:
    """[max_context, head_dim] float32: cosines of the head_dim / 2 angles at each position, then their sines.

    `factors` ([head_dim / 2]) is needed for rope scaling "factors". Source: RoFormer, https://arxiv.org/abs/2104.09864.
    """
    # Hugging Face computes all this in float32; so must we, to get the very same tokens.
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).to(torch.float32) / config.head_dim
    frequencies = scaled(1.0 / (config.rope_theta**exponents), config.rope_scaling, factors)
    positions = torch.arange(config.max_context, dtype=torch.float32)
    angles = positions[:, None] * frequencies[None, :]
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)


def scaled(frequencies: torch.Tensor, scaling: RopeScaling, factors: torch.Tensor | None = None) -> torch.Tensor:
    """Applies rope scaling to frequencies in radians per token."""
    if scaling.kind == "none":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "factors":
        assert factors is not None, "rope scaling by factors needs the tensor rope_factors"
        return frequencies / factors.to(frequencies)
    # Llama 3.1: keep what turns fast, divide what turns slowly, blend in between (by turns within the old context).
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_context / wavelengths
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies
