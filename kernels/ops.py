"""The operations a model is made of: the seam behind which implementations change places.

    kernels/reference.py      one token at a time, to be read; in float64 it is the truth of every test
    kernels/torch_ops.py      plain torch, on any device
    kernels/cpu/ops.py        C++ for CPUs with AVX-512
    kernels/gpu/ops.py        Triton

Each is a module that has these functions; `kernels/choice.py` says which one a device gets. Tests hold all to at most
twice plain torch's error in the same dtype.

A layer's cache `kv_layer` is contiguous [num_blocks, 2, block_size, kv_heads, head_dim], K at index 0 and V at 1. Its
dtype is that of the activations, or float8_e4m3fn. Slots and block table entries that belong to nobody may hold
anything, NaN too.
"""

from __future__ import annotations

from typing import Protocol

import torch

from kernels.attention_batch import AttentionBatch
from kernels.attention_variant import AttentionVariant


class Ops(Protocol):
    """Tensors are float32, bfloat16 or float16 unless said; all of one call agree. Results are fresh, inputs stay
    unchanged, but for the cache. The last dimension is contiguous; others may be strided."""

    def take_rows(self, table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Rows [count] int64 of table [n, width], in that order: [count, width]. An embedding, or a pick of tokens."""
        ...

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual) * weight, x + residual), over the last dimension of x [..., n]. Without a residual the
        second is x itself."""
        ...

    def rope_store(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor,
        table: torch.Tensor,
        kv_layer: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """Rotates q [tokens, heads, head_dim] and k [tokens, kv_heads, head_dim] by their positions [tokens] int64,
        half-split form; writes the rotated k, and v like k, into the slots [tokens] int64 (block_id * block_size +
        place; a negative one is padding and writes nothing). Returns the rotated q, contiguous.

        `table` [max_context, head_dim] float32 holds head_dim / 2 cosines, then sines. Products are float32 whatever
        q's dtype.
        """
        ...

    def paged_attention(
        self, q: torch.Tensor, kv_layer: torch.Tensor, batch: AttentionBatch, variant: AttentionVariant
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Every new token attends to what its row's cache holds up to itself. The batch's own K and V are in the cache
        already.

        q [tokens, heads, head_dim]; head h reads KV head h // (heads / kv_heads). Returns the output like q and the
        log-sum-exp of the scores [tokens, heads] in float32. Tokens of a row with context 0 (padding) get 0 and -inf.
        """
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up for gate_up [tokens, 2 * n], gate first. Returns [tokens, n]."""
        ...

    def copy_blocks(self, kv: torch.Tensor, pairs: torch.Tensor) -> None:
        """Copies whole blocks in all layers of kv [layers, num_blocks, ...]. `pairs` [n, 2] int64: (source, target);
        no block is both a target and anything else."""
        ...

    def gather_blocks(
        self, kv: torch.Tensor, block_ids: torch.Tensor, layers: range, block_tokens: int
    ) -> torch.Tensor:
        """The first `block_tokens` slots of each block [n] int64, as a fresh contiguous
        [layers, n, 2, block_tokens, kv_heads, head_dim]."""
        ...

    def scatter_blocks(
        self, kv: torch.Tensor, block_ids: torch.Tensor, first_slot: int, layers: range, blocks: torch.Tensor
    ) -> None:
        """The other end of `gather_blocks`: writes the tokens of `blocks` [layers, source blocks, 2, block_tokens,
        kv_heads, head_dim], in order, into the slots of `block_ids`, from `first_slot` of the first one on. Casts to
        the cache's dtype."""
        ...
