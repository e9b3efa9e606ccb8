"""Reading model configs: what each architecture's file means, and what is refused with which words."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import ModelFileError
from engine.model_config import RopeScaling, from_gguf, from_hf

HF: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 60,
    "intermediate_size": 100,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 160,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "eos_token_id": 2,
}
GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "general.name": "Tiny",
    "llama.block_count": 2,
    "llama.embedding_length": 60,
    "llama.feed_forward_length": 100,
    "llama.attention.head_count": 6,
    "llama.attention.head_count_kv": 2,
    "llama.vocab_size": 97,
    "llama.context_length": 160,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500.0,
    "tokenizer.ggml.eos_token_id": 2,
}


def test_both_readers_agree() -> None:
    assert from_hf(HF, "x") == from_gguf(GGUF, ["output.weight"], "x")


def test_what_a_file_leaves_out_has_the_field_s_defaults() -> None:
    config = from_hf({key: value for key, value in HF.items() if key not in ("num_key_value_heads", "rope_theta")})
    assert (config.num_kv_heads, config.head_dim, config.rope_theta, config.tie_embeddings) == (6, 10, 10000.0, False)
    assert from_gguf(GGUF).tie_embeddings, "a GGUF without output.weight is tied"
    assert from_gguf(GGUF).name == "Tiny"


def test_architectures_differ_in_bias_norm_and_window() -> None:
    qwen2 = from_hf({**HF, "model_type": "qwen2"})
    qwen3 = from_hf({**HF, "model_type": "qwen3", "head_dim": 32})
    assert (qwen2.qkv_bias, qwen2.qk_norm) == (True, False)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 32)
    mistral = from_hf({**HF, "model_type": "mistral", "sliding_window": 9})
    assert [mistral.window(layer) for layer in range(2)] == [9, 9]
    assert from_hf({**HF, "model_type": "mistral", "sliding_window": None}).sliding_window is None


def test_qwen_windows_only_its_later_layers_and_only_when_told_to() -> None:
    window = {"model_type": "qwen2", "sliding_window": 7, "max_window_layers": 1}
    assert from_hf({**HF, **window}).sliding_window is None
    config = from_hf({**HF, **window, "use_sliding_window": True})
    assert [config.window(layer) for layer in range(2)] == [None, 7]
    kinds = ["sliding_attention", "full_attention"]
    with pytest.raises(
        ModelFileError, match="layer_types is not supported unless it agrees with max_window_layers = 1"
    ):
        from_hf({**HF, **window, "use_sliding_window": True, "layer_types": kinds})


def test_rope_scaling_in_the_old_and_the_new_place() -> None:
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    expected = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    old = from_hf({**HF, "rope_scaling": llama3})
    new = from_hf(
        {**{k: v for k, v in HF.items() if k != "rope_theta"}, "rope_parameters": {**llama3, "rope_theta": 500.0}}
    )
    assert old.rope_scaling == new.rope_scaling == expected
    assert old.rope_theta == new.rope_theta == 500.0
    assert from_hf({**HF, "rope_scaling": {"type": "linear", "factor": 2.0}}).rope_scaling == RopeScaling("linear", 2.0)
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    assert from_gguf({**GGUF, **linear}).rope_scaling == RopeScaling("linear", 2.0)
    assert from_gguf(GGUF, ["rope_freqs.weight"]).rope_scaling.kind == "factors"


def test_end_tokens_come_from_both_files_without_repeats() -> None:
    assert from_hf({**HF, "eos_token_id": [2, 5]}, generation={"eos_token_id": [5, 7]}).eos_token_ids == (2, 5, 7)
    assert from_hf({**HF, "eos_token_id": None}).eos_token_ids == ()
    assert from_gguf({**GGUF, "tokenizer.ggml.eot_token_id": 3}).eos_token_ids == (2, 3)


def test_the_vocabulary_may_be_counted_from_the_gguf_tokens() -> None:
    metadata = {key: value for key, value in GGUF.items() if key != "llama.vocab_size"}
    assert from_gguf({**metadata, "tokenizer.ggml.tokens": ["a"] * 97}).vocab_size == 97


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2' is not supported; known: llama, qwen2, qwen3, mistral"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "60"}, "hidden_size = '60', expected an integer of at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0, expected an integer of at least 1"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True, expected an integer"),
        ({"num_key_value_heads": 4}, "6 attention heads cannot share 4 KV heads evenly"),
        ({"head_dim": 7}, "a head size of 7 is odd"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan is not a positive number"),
        ({"rope_theta": -1.0}, "rope_theta = -1.0 is not a positive number"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, "rope factor = 0.0 is not a positive number"),
        ({"rope_scaling": [1]}, "rope_scaling = \\[1\\], expected a mapping"),
        ({"attention_bias": True}, "attention_bias = true is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"eos_token_id": "x"}, "eos_token_id = 'x', expected a token id or a list"),
        ({"eos_token_id": 97}, "end token 97 lies outside the vocabulary of 97"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes', expected true or false"),
    ],
)
def test_a_bad_config_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        from_hf({**HF, **change}, "tiny")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "gemma"}, "general.architecture = 'gemma' is not supported; known: llama, qwen2"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count = 4 is not supported; head size 10"),
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn' is not supported"),
        ({"llama.context_length": None}, "llama.context_length is missing"),
        ({"llama.attention.head_count_kv": [2, 2]}, "head_count_kv = \\[2, 2\\], expected an integer"),
    ],
)
def test_bad_gguf_metadata_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        from_gguf({**GGUF, **change})
