"""Weights from both kinds of file, and every way in which a file can be unsound: a clear error, never a traceback."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig
from engine.engine import fingerprint, load_engine
from engine.errors import ConfigError, ModelFileError
from engine.gguf_file import GGUFFile, unpermute
from engine.model_source import ModelFiles
from engine.weights import Weights, expected_parts, load_weights, open_weights, random_weights
from tests.tiny_gguf import permute, write_gguf
from tests.tiny_models import CONFIGS, save_model

CPU = torch.device("cpu")


def load(files: ModelFiles, dtype: torch.dtype = torch.float32) -> Weights:
    return load_weights(open_weights(files), dtype, CPU)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def llama_gguf(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(llama, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A folder whose files a test may spoil."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((llama / name).read_bytes())
    return tmp_path


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3"])
def test_gguf_and_folder_hold_the_same_weights(variant: str, tmp_path: Path) -> None:
    folder = save_model(variant, tmp_path / "hf")
    hf, gguf = load(ModelFiles("hf", folder)), load(ModelFiles("gguf", write_gguf(folder, tmp_path / "m.gguf")))
    assert hf.tensors.keys() == gguf.tensors.keys()
    for name, tensor in hf.tensors.items():
        assert torch.equal(tensor, gguf.tensors[name]), name
    assert hf.digest == gguf.digest


def test_unpermute_undoes_the_converter() -> None:
    rows = np.arange(24 * 3, dtype=np.float32).reshape(24, 3)
    assert (unpermute(permute(rows, 4), 4) == rows).all()
    assert not (permute(rows, 4) == rows).all()


def test_fused_tensors_are_their_parts_in_order(llama: Path) -> None:
    parts = load_file(llama / "model.safetensors")
    tensors = load(ModelFiles("hf", llama)).tensors
    names = [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv"]
    assert torch.equal(tensors["layers.1.qkv"], torch.cat([parts[name] for name in names]))
    names = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up")]
    assert torch.equal(tensors["layers.0.gate_up"], torch.cat([parts[name] for name in names]))


def test_a_tied_head_is_the_embedding_itself(tmp_path: Path) -> None:
    tensors = load(ModelFiles("hf", save_model("qwen2", tmp_path))).tensors
    assert tensors["head"] is tensors["embed"]


def test_a_sharded_folder_equals_a_single_file(llama: Path, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    shards = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(sorted(tensors))}
    for shard in set(shards.values()):
        save_file({name: tensors[name] for name in tensors if shards[name] == shard}, copy / shard)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert load(ModelFiles("hf", copy)).digest == load(ModelFiles("hf", llama)).digest
    (copy / "model-1.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"model-1.safetensors: does not exist"):
        load(ModelFiles("hf", copy))
    shards[min(shards)] = "../model-0.safetensors"
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ModelFileError, match=r"'../model-0.safetensors', expected a file name"):
        load(ModelFiles("hf", copy))


def test_a_missing_tensor_is_named(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ModelFileError, match=r"tensor model.layers.1.mlp.up_proj.weight is missing"):
        load(ModelFiles("hf", copy))


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(61)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ModelFileError, match=r"tensor model.norm.weight has shape \[61\], expected \[60\]"):
        load(ModelFiles("hf", copy))


@pytest.mark.parametrize("kept", [0, 4, 100, 5000])
def test_a_truncated_safetensors_file_is_refused(copy: Path, kept: int) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelFileError, match="truncated or corrupt"):
        load(ModelFiles("hf", copy))


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ("[]", "expected a JSON object"), (None, "cannot be opened")]
)
def test_an_unreadable_config_is_refused(copy: Path, text: str | None, message: str) -> None:
    (copy / "config.json").unlink()
    if text is not None:
        (copy / "config.json").write_text(text)
    with pytest.raises(ModelFileError, match=f"config.json: {message}"):
        open_weights(ModelFiles("hf", copy))


def test_every_truncation_of_a_gguf_file_is_refused(llama_gguf: Path, tmp_path: Path) -> None:
    whole = llama_gguf.read_bytes()
    header_end = min(entry.offset for entry in GGUFFile(llama_gguf).tensors.values())
    path = tmp_path / "cut.gguf"
    for kept in [*range(0, header_end, 97), header_end, header_end + 1, len(whole) // 2, len(whole) - 33]:
        path.write_bytes(whole[:kept])
        with pytest.raises(ModelFileError, match=r"truncated|too short"):
            load(ModelFiles("gguf", path))


def test_garbage_in_a_gguf_header_never_hangs_nor_escapes(llama_gguf: Path, tmp_path: Path) -> None:
    """Flipped bytes may go unseen (a name's letter) or be refused; anything else would fail this test."""
    whole = bytearray(llama_gguf.read_bytes())
    header_end = min(entry.offset for entry in GGUFFile(llama_gguf).tensors.values())
    path = tmp_path / "garbage.gguf"
    refused = 0
    for position in range(0, header_end, 11):
        spoiled = bytearray(whole)
        spoiled[position] ^= 0xFF
        path.write_bytes(spoiled)
        try:
            load(ModelFiles("gguf", path))
        except ModelFileError:
            refused += 1
    assert refused > header_end // 11 // 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a GGUF file: too short"),
        (b"#!/bin/sh\necho\n", "not a GGUF file: it does not start with 'GGUF'"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "GGUF version 9 is not supported"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "general.architecture is missing"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 60), "truncated"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 1 << 60), "1152921504606846976 strings announced"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1), "unknown array type 9"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77), "unknown value type 77"),
    ],
)
def test_what_is_no_gguf_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=message):
        load(ModelFiles("gguf", path))


def test_a_missing_gguf_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="cannot be opened: No such file"):
        open_weights(ModelFiles("gguf", tmp_path / "none.gguf"))


def test_the_fingerprint_tells_weights_apart_but_not_dtypes(llama: Path, tmp_path: Path) -> None:
    files = ModelFiles("hf", llama)
    config = open_weights(files).config
    wide, narrow = load(files), load(files, torch.bfloat16)
    assert narrow.tensors["embed"].dtype == torch.bfloat16
    assert fingerprint(config, wide) == fingerprint(config, narrow)
    other = load(ModelFiles("hf", save_model("llama", tmp_path, seed=1)))
    assert fingerprint(config, wide) != fingerprint(config, other)


@pytest.mark.parametrize("variant", list(CONFIGS))
def test_random_weights_have_the_shapes_of_real_ones(variant: str, tmp_path: Path) -> None:
    files = ModelFiles("hf", save_model(variant, tmp_path))
    config, real = open_weights(files).config, load(files).tensors
    drawn = random_weights(config, torch.bfloat16, 0, CPU).tensors
    assert {name: tensor.shape for name, tensor in drawn.items()} == {name: t.shape for name, t in real.items()}
    assert set(expected_parts(config)) | {"head"} == set(drawn)
    again = random_weights(config, torch.bfloat16, 0, CPU).tensors
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)


async def test_load_engine_derives_its_pool_from_memory(llama_gguf: Path) -> None:
    block_bytes = 2 * 2 * 16 * 2 * 10 * 4
    engine = load_engine(EngineConfig(device="cpu", kv_cache_bytes=3 * block_bytes + 5), ModelFiles("gguf", llama_gguf))
    assert engine.runner.layout.num_blocks == 3
    assert engine.runner.layout.dtype == "float32"
    await engine.runner.close()
    with pytest.raises(ConfigError, match=f"kv_cache_bytes: got {block_bytes - 1}, expected at least {block_bytes}"):
        load_engine(EngineConfig(device="cpu", kv_cache_bytes=block_bytes - 1), ModelFiles("gguf", llama_gguf))


def test_a_device_that_is_not_there_is_refused(llama_gguf: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="device: got 'cuda'"):
        load_engine(EngineConfig(device="cuda"), ModelFiles("gguf", llama_gguf))
