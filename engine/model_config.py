"""What a model is: its sizes and constants, read from a Hugging Face config or from GGUF metadata.

Both readers end in the same frozen value and the same checks, so that nothing past this file knows where it came from.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from engine.fields import Fields

Architecture = Literal["llama", "qwen2", "qwen3", "mistral"]
ARCHITECTURES: tuple[str, ...] = get_args(Architecture)

# GGUF has no name of its own for Mistral: such files say "llama", with an optional sliding window.
GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3")

RopeKind = Literal["none", "linear", "llama3", "factors"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    `linear` divides all of them by `factor`; `llama3` divides the slow ones and blends in between (Llama 3.1);
    `factors` takes one divisor per frequency from the tensor "rope_factors" (how GGUF stores llama3 scaling).
    """

    kind: RopeKind = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes in elements, `max_context` in tokens. Layers [window_from_layer, num_layers) attend to the last
    `sliding_window` tokens only, themselves included; the rest, and all when it is None, to the whole context."""

    architecture: Architecture
    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    rope_theta: float
    rms_norm_eps: float
    rope_scaling: RopeScaling = RopeScaling()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    window_from_layer: int = 0
    eos_token_ids: tuple[int, ...] = ()

    def window(self, layer: int) -> int | None:
        """The attention window of one layer in tokens, None for the whole context."""
        return self.sliding_window if layer >= self.window_from_layer else None


def from_hf(config: Mapping[str, Any], name: str = "", generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """Reads a parsed config.json, and generation_config.json where there is one (it may name more end tokens).

    Raises ModelFileError naming the key that is missing, of the wrong kind, or not supported.
    """
    fields = Fields(config, f"config of {name!r}" if name else "config.json")
    architecture = fields.choice("model_type", ARCHITECTURES)
    for key in ("attention_bias", "mlp_bias"):
        if fields.flag(key, False):
            raise fields.error(f"{key} = true is not supported")
    num_heads = fields.count("num_attention_heads")
    hidden_size = fields.count("hidden_size")
    num_layers = fields.count("num_hidden_layers")
    window, window_from_layer = _hf_window(fields, architecture, num_layers)
    theta, scaling = _hf_rope(fields)
    eos = fields.token_ids("eos_token_id")
    if generation is not None:
        eos += Fields(generation, "generation_config.json").token_ids("eos_token_id")
    result = ModelConfig(
        architecture=cast(Architecture, architecture),
        name=name,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=fields.count("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=fields.count("num_key_value_heads", num_heads),
        head_dim=fields.count("head_dim", hidden_size // num_heads),
        vocab_size=fields.count("vocab_size"),
        max_context=fields.count("max_position_embeddings"),
        rope_theta=theta,
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope_scaling=scaling,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        sliding_window=window,
        window_from_layer=window_from_layer,
        eos_token_ids=tuple(dict.fromkeys(eos)),
    )
    if fields.text("hidden_act", "silu") not in ("silu", "swish"):
        raise fields.error(f"hidden_act = {config['hidden_act']!r} is not supported; known: silu")
    return _checked(result, fields)


def from_gguf(metadata: Mapping[str, Any], tensor_names: Collection[str] = (), name: str = "") -> ModelConfig:
    """Reads GGUF metadata as plain values. `tensor_names` tell what the metadata leaves out: an untied output head,
    biases, per-frequency rotary factors. Raises ModelFileError like `from_hf`."""
    fields = Fields(metadata, f"metadata of {name!r}" if name else "GGUF metadata")
    prefix = fields.choice("general.architecture", GGUF_ARCHITECTURES)
    num_heads = fields.count(f"{prefix}.attention.head_count")
    hidden_size = fields.count(f"{prefix}.embedding_length")
    head_dim = fields.count(f"{prefix}.attention.key_length", hidden_size // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.count(f"{prefix}.{key}", head_dim) != head_dim:
            raise fields.error(f"{prefix}.{key} = {metadata[f'{prefix}.{key}']} is not supported; head size {head_dim}")
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    window = fields.count(f"{prefix}.attention.sliding_window", 0, at_least=0)
    eos = [fields.count(key, -1, at_least=-1) for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")]
    result = ModelConfig(
        architecture=cast(Architecture, prefix),
        name=name or fields.text("general.name", ""),
        num_layers=fields.count(f"{prefix}.block_count"),
        hidden_size=hidden_size,
        intermediate_size=fields.count(f"{prefix}.feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=fields.count(f"{prefix}.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        vocab_size=fields.count(f"{prefix}.vocab_size", len(tokens) or None),
        max_context=fields.count(f"{prefix}.context_length"),
        rope_theta=fields.number(f"{prefix}.rope.freq_base", 10000.0),
        rms_norm_eps=fields.number(f"{prefix}.attention.layer_norm_rms_epsilon"),
        rope_scaling=_gguf_rope(fields, prefix, tensor_names),
        tie_embeddings="output.weight" not in tensor_names,
        qkv_bias="blk.0.attn_q.bias" in tensor_names or prefix == "qwen2",
        qk_norm=prefix == "qwen3",
        sliding_window=window or None,
        eos_token_ids=tuple(dict.fromkeys(token_id for token_id in eos if token_id >= 0)),
    )
    return _checked(result, fields)


def _hf_window(fields: Fields, architecture: str, num_layers: int) -> tuple[int | None, int]:
    """(window in tokens or None, first layer that has it)."""
    if architecture == "llama" or fields.values.get("sliding_window") is None:
        return None, 0
    window = fields.count("sliding_window")
    if architecture == "mistral":
        return window, 0
    if not fields.flag("use_sliding_window", False):
        return None, 0
    first = fields.count("max_window_layers", num_layers, at_least=0)
    kinds = fields.values.get("layer_types")
    if kinds is not None:
        expected = ["full_attention" if layer < first else "sliding_attention" for layer in range(num_layers)]
        if list(kinds) != expected:
            raise fields.error(f"layer_types is not supported unless it agrees with max_window_layers = {first}")
    return window, first


def _hf_rope(fields: Fields) -> tuple[float, RopeScaling]:
    """(theta, scaling). Newer files hold both in `rope_parameters`, older ones in `rope_theta` and `rope_scaling`."""
    rope = fields.group("rope_parameters") or fields.group("rope_scaling")
    theta_holder = rope if rope is not None and "rope_theta" in rope.values else fields
    theta = theta_holder.number("rope_theta", 10000.0)
    if rope is None:
        return theta, RopeScaling()
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind == "default":
        return theta, RopeScaling()
    if kind == "linear":
        return theta, RopeScaling("linear", factor=rope.number("factor"))
    if kind != "llama3":
        raise fields.error(f"rope scaling {kind!r} is not supported; known: default, linear, llama3")
    return theta, RopeScaling(
        "llama3",
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_context=rope.count("original_max_position_embeddings"),
    )


def _gguf_rope(fields: Fields, prefix: str, tensor_names: Collection[str]) -> RopeScaling:
    if "rope_freqs.weight" in tensor_names:
        return RopeScaling("factors")
    kind = fields.text(f"{prefix}.rope.scaling.type", "none")
    if kind == "none":
        return RopeScaling()
    if kind != "linear":
        raise fields.error(f"rope scaling {kind!r} is not supported; known: none, linear, rope_freqs.weight")
    return RopeScaling("linear", factor=fields.number(f"{prefix}.rope.scaling.factor"))


def _checked(config: ModelConfig, fields: Fields) -> ModelConfig:
    """Refuses values that are each well-formed but make no model together."""
    if config.num_heads % config.num_kv_heads:
        raise fields.error(f"{config.num_heads} attention heads cannot share {config.num_kv_heads} KV heads evenly")
    if config.head_dim % 2:
        raise fields.error(f"a head size of {config.head_dim} is odd: rotary embedding needs pairs")
    scaling = config.rope_scaling
    for label, value in (
        ("rope_theta", config.rope_theta),
        ("rms_norm_eps", config.rms_norm_eps),
        ("rope factor", scaling.factor),
        ("low_freq_factor", scaling.low_freq_factor),
    ):
        if not (math.isfinite(value) and value > 0):
            raise fields.error(f"{label} = {value} is not a positive number")
    if scaling.kind == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor:
        raise fields.error(f"high_freq_factor {scaling.high_freq_factor} must exceed {scaling.low_freq_factor}")
    for token_id in config.eos_token_ids:
        if token_id >= config.vocab_size:
            raise fields.error(f"end token {token_id} lies outside the vocabulary of {config.vocab_size}")
    return config
