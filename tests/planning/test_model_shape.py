"""Model shapes: published parameter counts, config.json of both kinds, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.planning.model_shape import BUILT_IN, ModelShape, model_shape
from engine.errors import ConfigError, ModelFileError

# Elements of the published safetensors files, a tied head counted once; KV bytes of a token in 2-byte elements.
PUBLISHED = {
    "llama-3.1-8b": (8_030_261_248, 131_072),
    "llama-3.1-70b": (70_553_706_496, 327_680),
    "qwen3-8b": (8_190_735_360, 147_456),
    "opt-13b": (12_853_473_280, 819_200),
    "opt-66b": (65_719_701_504, 2_359_296),
    "smollm2-135m": (134_515_008, 23_040),
}

OPT_13B: dict[str, Any] = {
    "model_type": "opt",
    "hidden_size": 5120,
    "word_embed_proj_dim": 5120,
    "ffn_dim": 20480,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
}
QWEN3_8B: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
}


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_built_in_sizes_are_the_published_ones(name: str) -> None:
    shape = model_shape(name)
    assert (shape.weight_params, shape.kv_token_bytes()) == PUBLISHED[name]
    assert shape.weight_bytes() == 2 * shape.weight_params
    assert shape.kv_token_bytes(4) == 2 * shape.kv_token_bytes()


def test_every_built_in_shape_is_checked() -> None:
    assert set(BUILT_IN) == set(PUBLISHED)


@pytest.mark.parametrize(("name", "config"), [("opt-13b", OPT_13B), ("qwen3-8b", QWEN3_8B)])
def test_a_config_gives_the_same_shape(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    path = write_config(tmp_path / name, config)
    assert model_shape(str(path)) == model_shape(name)
    assert model_shape(str(path.parent)) == model_shape(name)


def test_qwen2_counts_its_biases(tmp_path: Path) -> None:
    config = {**QWEN3_8B, "model_type": "qwen2"}
    shape = model_shape(str(write_config(tmp_path / "qwen2", config)))
    q_k_v_bias, q_k_norm = 4096 + 2 * 1024, 2 * 128
    assert shape.weight_params == PUBLISHED["qwen3-8b"][0] + 36 * (q_k_v_bias - q_k_norm)


def test_layer_params_by_hand() -> None:
    shape = ModelShape("tiny", 1, 8, 2, 1, 4, 16, 10, 32)
    assert shape.layer_matrix_params == 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16
    assert shape.layer_params == shape.layer_matrix_params + 2 * 8
    assert shape.weight_params == 2 * 10 * 8 + shape.layer_params + 8


def test_an_unknown_name_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'llama-9' is no built-in shape.*llama-3\.1-8b.*smollm2-135m"):
        model_shape("llama-9")


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="known shapes"):
        model_shape(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_attention_heads": 33}, "5120 does not divide into 33 heads"),
        ({"word_embed_proj_dim": 512}, "word_embed_proj_dim"),
        ({"model_type": "gpt2"}, "known: llama"),
    ],
)
def test_a_config_that_cannot_be_used_names_the_key(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_config(tmp_path / "bad", {**OPT_13B, **change})
    with pytest.raises(ModelFileError, match=message):
        model_shape(str(path))


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "no JSON object")])
def test_a_file_that_is_no_config(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ModelFileError, match=message):
        model_shape(str(path))
