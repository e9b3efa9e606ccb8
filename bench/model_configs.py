"""Models whose shapes are enough to measure speed with: their weights are then random, and no file is needed."""

from __future__ import annotations

from engine.model_config import ModelConfig, RopeScaling

LLAMA_31_8B = ModelConfig(
    architecture="llama",
    name="llama-3.1-8b",
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_context=131072,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
    rope_scaling=RopeScaling("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192),
    eos_token_ids=(128001, 128008, 128009),
)
# Runs anywhere in no time: to see that a benchmark works.
TINY = ModelConfig(
    architecture="llama",
    name="tiny",
    num_layers=2,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=512,
    max_context=4096,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
)
MODELS = {config.name: config for config in (LLAMA_31_8B, TINY)}
