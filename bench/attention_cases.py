"""Attention at the shapes of docs/performance.md, beside torch's own on keys that are already gathered.

Queries, keys and values are random; so are block tables, in which no two neighbours are neighbours in memory. Peers
have no block tables: their contiguous K and V are made before the clock starts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.kernel_case import Case, Sizes, Work
from bench.kv_outer_attention import kv_outer_attention
from kernels.attention_batch import AttentionBatch, build_attention_batch
from kernels.gpu import ops

SDPA_BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def decode_case(
    sizes: Sizes, batch: int, context: int, kv_dtype: torch.dtype | None = None, flex: bool = False
) -> Case:
    """One new token for each of `batch` sequences. `kv_dtype`: the cache's, where it is not the queries' own."""
    q, kv, tables = _paged(sizes, batch, 1, context)
    name = f"decode attention, batch {batch}, context {context}"
    peers: dict[str, Work] = {}
    if kv_dtype is None:
        k, v = _gathered(sizes, kv, tables, context)
        peers = _decode_peers(sizes, q, k, v, flex)
    else:
        # What such a cache holds; no backend of torch's reads it.
        kv = kv.to(kv_dtype)
        name += f", {str(kv_dtype).removeprefix('torch.')} KV"
    return Case(
        name,
        lambda: ops.paged_attention(q, kv, tables, sizes.variant),
        moved=2 * batch * context * sizes.kv_heads * sizes.head_dim * kv.itemsize,
        flops=4 * batch * context * sizes.heads * sizes.head_dim,
        peers=peers,
    )


def prefill_case(sizes: Sizes, batch: int, new: int, context: int, flex: bool = False) -> Case:
    """The last `new` of `context` tokens, causal. With a context before them torch has no backend to compare."""
    q, kv, tables = _paged(sizes, batch, new, context)
    peers: dict[str, Work] = {}
    if new == context:
        k, v = _gathered(sizes, kv, tables, context)
        peers = _prefill_peers(sizes, q.view(batch, new, sizes.heads, sizes.head_dim), k, v, flex)
    # A query at position p sees p + 1 keys.
    pairs = batch * new * (2 * context - new + 1) // 2
    kv_bytes = 2 * batch * context * sizes.kv_heads * sizes.head_dim * kv.itemsize
    return Case(
        f"prefill attention, {batch} x {new} tokens, context {context}",
        lambda: ops.paged_attention(q, kv, tables, sizes.variant),
        moved=2 * q.nbytes + kv_bytes,
        flops=4 * pairs * sizes.heads * sizes.head_dim,
        peers=peers,
    )


def _paged(sizes: Sizes, batch: int, new: int, context: int) -> tuple[torch.Tensor, torch.Tensor, AttentionBatch]:
    """q, one layer's cache, and a batch of equal rows with `new` tokens each at the end of `context`."""
    blocks = -(-context // sizes.block_size)
    kv = sizes.randn(batch * blocks, 2, sizes.block_size, sizes.kv_heads, sizes.head_dim)
    order = torch.randperm(batch * blocks).tolist()
    rows = [(context - new, new, order[row * blocks : (row + 1) * blocks]) for row in range(batch)]
    q = sizes.randn(batch * new, sizes.heads, sizes.head_dim)
    return q, kv, build_attention_batch(rows, sizes.block_size, sizes.device)


def _gathered(sizes: Sizes, kv: torch.Tensor, batch: AttentionBatch, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [rows, kv_heads, context, head_dim], contiguous."""
    rows = kv[batch.block_tables].transpose(1, 2)
    rows = rows.reshape(len(batch.block_tables), 2, -1, sizes.kv_heads, sizes.head_dim)[:, :, :context]
    k, v = (rows[:, half].transpose(1, 2).contiguous() for half in (0, 1))
    return k, v


def _decode_peers(sizes: Sizes, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, flex: bool) -> dict[str, Work]:
    """SDPA twice: as its manual says, and with the heads of a group as that many queries, which reads K and V once."""
    batch = len(q)
    queries, packed = q.unsqueeze(2), q.view(batch, sizes.kv_heads, -1, sizes.head_dim)
    peers: dict[str, Work] = {}
    for name, backend in SDPA_BACKENDS.items():
        peers[name] = _sdpa(backend, queries, k, v, is_causal=False)
        peers[f"{name}, heads packed"] = _sdpa(backend, packed, k, v, is_causal=False)
    if flex:
        peers["flex_attention"] = lambda: _flex_attention()(queries, k, v, enable_gqa=True)
    return peers


def _prefill_peers(sizes: Sizes, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, flex: bool) -> dict[str, Work]:
    """A backend that cannot share KV heads gets them repeated, for free: the arithmetic is the same."""
    queries = q.transpose(1, 2).contiguous()
    peers: dict[str, Work] = {}
    for name, backend in SDPA_BACKENDS.items():
        work = _sdpa(backend, queries, k, v, is_causal=True)
        if not _runs(work):
            work = _sdpa(backend, queries, *_repeated(k, v, sizes.heads // sizes.kv_heads), is_causal=True)
        peers[name] = work
    if flex:
        mask = _causal_mask(queries.shape[2], str(queries.device))
        peers["flex_attention"] = lambda: _flex_attention()(queries, k, v, block_mask=mask, enable_gqa=True)
    peers["KV-outer order"] = lambda: kv_outer_attention(queries, k, v, sizes.variant.scale)
    return peers


def _sdpa(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, is_causal: bool) -> Work:
    def work() -> torch.Tensor:
        with sdpa_kernel(backend):
            shares = q.shape[1] != k.shape[1]
            return functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=shares)

    return work


def _runs(work: Work) -> bool:
    try:
        work()
    except RuntimeError:
        return False
    return True


def _repeated(k: torch.Tensor, v: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    return k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)


@functools.cache
def _flex_attention() -> Callable[..., torch.Tensor]:
    # Imported here: it brings the whole compiler along.
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _causal_mask(tokens: int, device: str) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    def is_seen(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return query >= key

    return create_block_mask(is_seen, None, None, tokens, tokens, device=device)
