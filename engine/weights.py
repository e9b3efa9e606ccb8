"""Weights of one model, read from whatever file they come in, under the names of engine/weight_parts.py.

A rank of several (engine/shard.py) gets its share under the same names, layers numbered from 0: its heads' rows of qkv
and columns of o, its columns' rows of gate_up and columns of down, its rows of head; embed on the first stage, norm and
head on the last.
"""

from __future__ import annotations

import re
from hashlib import blake2b
from typing import Protocol

import torch

from engine.errors import ModelFileError
from engine.gguf_file import GGUFFile, unpermute
from engine.hf_folder import HFFolder
from engine.model_config import ModelConfig, from_gguf, from_hf
from engine.model_source import ModelFiles
from engine.shard import Shard, whole
from engine.weight_parts import Part, Weights, empty, expected_parts, random_weights

__all__ = [
    "GGUFWeights",
    "HFWeights",
    "Part",
    "WeightSource",
    "Weights",
    "expected_parts",
    "load_weights",
    "open_weights",
    "random_weights",
]

# Enough to tell two fine-tunes apart (they move every matrix), little enough to cost nothing.
DIGEST_ELEMENTS_PER_TENSOR = 64

HF_NAMES = {
    "embed": "model.embed_tokens.weight",
    "attn_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "o": "self_attn.o_proj.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}
GGUF_NAMES = {
    "embed": "token_embd.weight",
    "attn_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "o": "attn_output.weight",
    "mlp_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    "norm": "output_norm.weight",
    "head": "output.weight",
    "rope_factors": "rope_freqs.weight",
}
LAYER_KEY = re.compile(r"layers\.(\d+)\.(\w+)")


class WeightSource(Protocol):
    """An opened model file."""

    @property
    def config(self) -> ModelConfig: ...

    def name(self, part: Part) -> str:
        """What the file calls this part."""
        ...

    def shape(self, part: Part) -> tuple[int, ...]:
        """Raises ModelFileError when the part is missing."""
        ...

    def read(self, part: Part) -> torch.Tensor: ...

    def error(self, problem: str) -> ModelFileError: ...


class HFWeights:
    """A Hugging Face folder as a WeightSource."""

    def __init__(self, files: ModelFiles) -> None:
        self._folder = HFFolder(files.path)
        self.config = from_hf(self._folder.config, files.path.name, self._folder.generation)

    def name(self, part: Part) -> str:
        return _file_name(part.key, HF_NAMES, "model.layers")

    def shape(self, part: Part) -> tuple[int, ...]:
        if self.name(part) not in self._folder.tensors:
            raise self.error(f"tensor {self.name(part)} is missing")
        return self._folder.shape(self.name(part))

    def read(self, part: Part) -> torch.Tensor:
        return self._folder.read(self.name(part))

    def error(self, problem: str) -> ModelFileError:
        return ModelFileError(self._folder.path, problem)


class GGUFWeights:
    """A GGUF file as a WeightSource."""

    def __init__(self, files: ModelFiles) -> None:
        self._file = GGUFFile(files.path)
        self.config = from_gguf(self._file.metadata, self._file.tensors, files.path.stem)

    def name(self, part: Part) -> str:
        return _file_name(part.key, GGUF_NAMES, "blk")

    def shape(self, part: Part) -> tuple[int, ...]:
        if self.name(part) not in self._file.tensors:
            raise self.error(f"tensor {self.name(part)} is missing")
        return self._file.shape(self.name(part))

    def read(self, part: Part) -> torch.Tensor:
        rows = self._file.read(self.name(part))
        if part.rotary_heads and self.config.architecture == "llama":
            rows = unpermute(rows, part.rotary_heads)
        # A copy where the array is a view of the read-only file: torch has no read-only tensors.
        return torch.from_numpy(rows if rows.flags.writeable else rows.copy())

    def error(self, problem: str) -> ModelFileError:
        return ModelFileError(self._file.path, problem)


def open_weights(files: ModelFiles) -> WeightSource:
    """Opens a model and reads its config, but no tensors yet. Raises ModelFileError."""
    return GGUFWeights(files) if files.kind == "gguf" else HFWeights(files)


def load_weights(source: WeightSource, dtype: torch.dtype, device: torch.device, shard: Shard | None = None) -> Weights:
    """Reads, checks, casts and fuses every tensor the config asks for; others in the file are ignored.

    A `shard` gets its share of them, but the same digest: that is of the whole model.
    Raises ModelFileError naming a tensor that is missing or has another shape than the config implies.
    """
    config = source.config
    shard = shard or whole(config)
    expected = expected_parts(config)
    for parts in expected.values():
        for part in parts:
            shape = source.shape(part)
            if shape != part.shape:
                raise source.error(f"tensor {source.name(part)} has shape {list(shape)}, expected {list(part.shape)}")
    digest = blake2b(digest_size=16)
    tensors = {}
    for key, parts in expected.items():
        name = _local_name(key, config, shard)
        pieces = []
        for part in parts:
            tensor = source.read(part)
            step = max(1, tensor.numel() // DIGEST_ELEMENTS_PER_TENSOR)
            digest.update(tensor.flatten()[::step].to(torch.float32).numpy().tobytes())
            if name is not None:
                pieces.append(_share(tensor, part, name, config, shard))
        if name is not None:
            tensors[name] = _fuse(name, pieces, dtype, device)
    if config.tie_embeddings and shard.is_last and shard.is_first:
        embed, rows = tensors["embed"], shard.vocab
        tensors["head"] = embed if len(rows) == len(embed) else embed[rows.start : rows.stop]
    return Weights(tensors, digest.hexdigest())


def _local_name(key: str, config: ModelConfig, shard: Shard) -> str | None:
    """What a shard calls a tensor, or None when another stage holds it."""
    match = LAYER_KEY.fullmatch(key)
    if match is not None:
        layer = int(match[1])
        return f"layers.{layer - shard.layers.start}.{match[2]}" if layer in shard.layers else None
    if key == "embed" and not shard.is_first:
        # A tied head is the same file tensor.
        return "head" if config.tie_embeddings and shard.is_last else None
    return None if key in ("norm", "head") and not shard.is_last else key


def _share(tensor: torch.Tensor, part: Part, name: str, config: ModelConfig, shard: Shard) -> torch.Tensor:
    """The piece of one file tensor that a shard holds, as a view."""
    match part.key.rpartition(".")[2].removesuffix("_bias"):
        case "q":
            return tensor[shard.heads.start * config.head_dim : shard.heads.stop * config.head_dim]
        case "k" | "v":
            return tensor[shard.kv_heads.start * config.head_dim : shard.kv_heads.stop * config.head_dim]
        case "o":
            return tensor[:, shard.heads.start * config.head_dim : shard.heads.stop * config.head_dim]
        case "gate" | "up":
            return tensor[shard.columns.start : shard.columns.stop]
        case "down":
            return tensor[:, shard.columns.start : shard.columns.stop]
    return tensor[shard.vocab.start : shard.vocab.stop] if name == "head" else tensor


def _fuse(name: str, pieces: list[torch.Tensor], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The pieces one below the other, cast."""
    target = empty(name, [tuple(piece.shape) for piece in pieces], dtype, device)
    first_row = 0
    for piece in pieces:
        target[first_row : first_row + len(piece)].copy_(piece)
        first_row += len(piece)
    return target


def _file_name(key: str, names: dict[str, str], layers: str) -> str:
    match = LAYER_KEY.fullmatch(key)
    return f"{layers}.{match[1]}.{names[match[2]]}" if match else names[key]
