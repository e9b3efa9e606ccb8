"""What a cost model needs to know of a model: its sizes, without weights. Some are built in, or from a config.json.

attention + feed-forward matrices of a layer ── the GEMMs ┐
heads, KV heads, head size ── attention, KV bytes         ├ cluster/planning/cost_model.py
vocabulary ── the output head's GEMM                      ┘
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, ModelFileError
from engine.fields import Fields
from engine.model_config import ModelConfig, from_hf

# OPT keeps two more position rows than its context has tokens: its first real position is 2.
OPT_POSITION_OFFSET = 2


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder's sizes in elements, `max_context` in tokens.

    `is_gated`: the feed-forward block has three matrices (SwiGLU), else two. `norm_rows`: vectors of a normalisation
    (1 for RMSNorm, 2 for LayerNorm with its bias). `position_rows`: rows of a learned position table, 0 for rotary.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_context: int
    is_gated: bool = True
    has_tied_embeddings: bool = False
    has_qkv_bias: bool = False
    has_other_biases: bool = False
    has_qk_norm: bool = False
    norm_rows: int = 1
    position_rows: int = 0

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of one token's keys in one layer; its values take as many again."""
        return self.num_kv_heads * self.head_dim

    @property
    def ffn_matrices(self) -> int:
        return 3 if self.is_gated else 2

    @property
    def layer_matrix_params(self) -> int:
        """Elements of one layer's matrices: what every step reads and multiplies."""
        attention = self.hidden_size * (2 * self.q_size + 2 * self.kv_size)
        return attention + self.ffn_matrices * self.hidden_size * self.intermediate_size

    @property
    def layer_params(self) -> int:
        """All elements of one layer: matrices, biases and norms."""
        biases = self.q_size + 2 * self.kv_size if self.has_qkv_bias else 0
        if self.has_other_biases:
            biases += 2 * self.hidden_size + (self.ffn_matrices - 1) * self.intermediate_size
        norms = 2 * self.norm_rows * self.hidden_size + (2 * self.head_dim if self.has_qk_norm else 0)
        return self.layer_matrix_params + biases + norms

    @property
    def weight_params(self) -> int:
        """All elements of the model as published; a tied output head counts once."""
        tables = self.vocab_size * self.hidden_size * (1 if self.has_tied_embeddings else 2)
        tables += self.position_rows * self.hidden_size
        return tables + self.num_layers * self.layer_params + self.norm_rows * self.hidden_size

    def weight_bytes(self, element_bytes: int = 2) -> int:
        return self.weight_params * element_bytes

    def kv_token_bytes(self, element_bytes: int = 2) -> int:
        """Bytes of one token's keys and values over all layers."""
        return self.num_layers * 2 * self.kv_size * element_bytes


def _opt(name: str, num_layers: int, hidden_size: int, num_heads: int) -> ModelShape:
    return ModelShape(
        name=name,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        intermediate_size=4 * hidden_size,
        vocab_size=50272,
        max_context=2048,
        is_gated=False,
        has_tied_embeddings=True,
        has_qkv_bias=True,
        has_other_biases=True,
        norm_rows=2,
        position_rows=2048 + OPT_POSITION_OFFSET,
    )


# From the models' published config.json files.
BUILT_IN: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        ModelShape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256, 131072),
        ModelShape("llama-3.1-70b", 80, 8192, 64, 8, 128, 28672, 128256, 131072),
        ModelShape("qwen3-8b", 36, 4096, 32, 8, 128, 12288, 151936, 40960, has_qk_norm=True),
        _opt("opt-13b", 40, 5120, 40),
        _opt("opt-66b", 64, 9216, 72),
        ModelShape("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49152, 8192, has_tied_embeddings=True),
    )
}


def model_shape(name_or_path: str) -> ModelShape:
    """A built-in shape by name, or one read from a config.json or from the folder that holds it.

    Raises ConfigError for a name that is neither, ModelFileError naming the key of a config that cannot be used.
    """
    built_in = BUILT_IN.get(name_or_path)
    if built_in is not None:
        return built_in
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        known = ", ".join(BUILT_IN)
        raise ConfigError(f"model {name_or_path!r} is no built-in shape and no config.json; known shapes: {known}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFileError(path, f"is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelFileError(path, "holds no JSON object")
    return shape_of_config(config, path.resolve().parent.name)


def shape_of_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape in a parsed config.json: OPT, or a family the engine runs. Raises ModelFileError naming the key."""
    if config.get("model_type") == "opt":
        return _shape_of_opt(Fields(config, f"config of {name!r}"), name)
    return shape_of_model(from_hf(config, name))


def shape_of_model(config: ModelConfig) -> ModelShape:
    """The shape of a model that the engine has loaded."""
    return ModelShape(
        name=config.name,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_context=config.max_context,
        has_tied_embeddings=config.tie_embeddings,
        has_qkv_bias=config.qkv_bias,
        has_qk_norm=config.qk_norm,
    )


def _shape_of_opt(fields: Fields, name: str) -> ModelShape:
    hidden_size = fields.count("hidden_size")
    if fields.count("word_embed_proj_dim", hidden_size) != hidden_size:
        raise fields.error("word_embed_proj_dim other than hidden_size is not supported (opt-350m)")
    num_heads = fields.count("num_attention_heads")
    if hidden_size % num_heads:
        raise fields.error(f"hidden_size {hidden_size} does not divide into {num_heads} heads")
    has_biases = fields.flag("enable_bias", True)
    max_context = fields.count("max_position_embeddings")
    return ModelShape(
        name=name,
        num_layers=fields.count("num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        intermediate_size=fields.count("ffn_dim"),
        vocab_size=fields.count("vocab_size"),
        max_context=max_context,
        is_gated=False,
        has_tied_embeddings=fields.flag("tie_word_embeddings", True),
        has_qkv_bias=has_biases,
        has_other_biases=has_biases,
        norm_rows=2,
        position_rows=max_context + OPT_POSITION_OFFSET,
    )
