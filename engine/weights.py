"""Weights of one model under one set of names, whatever file they come from.

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

A rank of several (engine/shard.py) gets its share under the same names, layers numbered from 0: its heads' rows of qkv
and columns of o, its columns' rows of gate_up and columns of down, its rows of head; embed on the first stage, norm and
head on the last.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

import torch

from engine.errors import ModelFileError
from engine.gguf_file import GGUFFile, unpermute
from engine.hf_folder import HFFolder
from engine.model_config import ModelConfig, from_gguf, from_hf
from engine.model_source import ModelFiles
from engine.shard import Shard, whole

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


def random_weights(config: ModelConfig, dtype: torch.dtype, seed: int, device: torch.device) -> Weights:
    """Weights of the right shapes and a sane scale, for tests and benchmarks of speed without a model file."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for key, parts in expected_parts(config).items():
        target = _empty(key, [part.shape for part in parts], dtype, device)
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
    target = _empty(name, [tuple(piece.shape) for piece in pieces], dtype, device)
    first_row = 0
    for piece in pieces:
        target[first_row : first_row + len(piece)].copy_(piece)
        first_row += len(piece)
    return target


def _empty(key: str, shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    rows = sum(shape[0] for shape in shapes)
    # Rotary angles reach thousands of radians: in 16 bits they would be noise.
    dtype = torch.float32 if key == "rope_factors" else dtype
    return torch.empty((rows, *shapes[0][1:]), dtype=dtype, device=device)


def _file_name(key: str, names: dict[str, str], layers: str) -> str:
    match = LAYER_KEY.fullmatch(key)
    return f"{layers}.{match[1]}.{names[match[2]]}" if match else names[key]
