"""FlashAttention-1's order of loops (https://arxiv.org/abs/2205.14135), to be measured beside the one that is used.

A program takes one head. Its outer loop goes over keys and values, its inner loop over queries, so each tile of K and V
is read once; but the unfinished output and the softmax's state of every query are read, rescaled and written again for
every tile of keys. With T tokens and tiles of t that is about T² / 2t times 8 * head_dim bytes for each head, where
queries outside move T² / 2t times 4 * head_dim bytes of K and V in 16 bit, reading only and mostly from the L2 cache;
and a sequence gets no more programs than it has heads.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
# tl.dot's smallest side.
HEAD_DIM_MIN = 16


@triton.jit  # type: ignore[untyped-decorator]
def _kv_outer_attention(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, output: tl.tensor, lse: tl.tensor,
    unfinished: tl.tensor, maxima: tl.tensor, sums: tl.tensor,
    tokens: tl.tensor, heads: tl.tensor, group: tl.tensor, scale: tl.tensor,
    HEAD_DIM: tl.constexpr, TILE_QUERIES: tl.constexpr, TILE_KEYS: tl.constexpr,
) -> None:  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    kv_head = head // heads * (heads // group) + head % heads // group
    first_query, first_key = head * tokens, kv_head * tokens
    columns = tl.arange(0, HEAD_DIM)[None, :]
    for key_start in range(0, tokens, TILE_KEYS):
        keys = key_start + tl.arange(0, TILE_KEYS)
        key_places = (first_key + keys)[:, None] * HEAD_DIM + columns
        key_tile = tl.load(k + key_places, mask=(keys < tokens)[:, None], other=0.0)
        value_tile = tl.load(v + key_places, mask=(keys < tokens)[:, None], other=0.0)
        for query_start in range(key_start // TILE_QUERIES * TILE_QUERIES, tokens, TILE_QUERIES):
            queries = query_start + tl.arange(0, TILE_QUERIES)
            is_query = queries < tokens
            rows = first_query + queries
            places = rows[:, None] * HEAD_DIM + columns
            query_tile = tl.load(q + places, mask=is_query[:, None], other=0.0)
            scores = tl.dot(query_tile, tl.trans(key_tile), input_precision="ieee") * (scale * LOG2E)
            scores = tl.where(keys[None, :] <= queries[:, None], scores, float("-inf"))

            keys_before = tl.zeros([TILE_QUERIES], tl.int32) + key_start
            is_begun = is_query & (keys_before > 0)
            row_max = tl.load(maxima + rows, mask=is_begun, other=-1e30)
            row_sum = tl.load(sums + rows, mask=is_begun, other=0.0)
            acc = tl.load(unfinished + places, mask=is_begun[:, None], other=0.0)
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            p = tl.exp2(scores - new_max[:, None])
            fade = tl.exp2(row_max - new_max)
            row_sum = row_sum * fade + tl.sum(p, 1)
            acc = tl.dot(p.to(value_tile.dtype), value_tile, acc * fade[:, None], input_precision="ieee")

            # A query tile's last keys are those that hold its own last token.
            last_query = tl.minimum(query_start + TILE_QUERIES, tokens) - 1
            is_done = is_query & (keys_before + TILE_KEYS > last_query)
            goes_on = is_query & (keys_before + TILE_KEYS <= last_query)
            tl.store(maxima + rows, new_max, mask=goes_on)
            tl.store(sums + rows, row_sum, mask=goes_on)
            tl.store(unfinished + places, acc, mask=goes_on[:, None])
            tl.store(lse + rows, (new_max + tl.log2(row_sum)) * LN2, mask=is_done)
            finished = (acc * (1.0 / row_sum)[:, None]).to(output.dtype.element_ty)
            tl.store(output + places, finished, mask=is_done[:, None])
        # What this program's threads have written, others of its threads read next.
        tl.debug_barrier()


def kv_outer_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    tile_queries: int = 128,
    tile_keys: int = 64,
    num_warps: int = 8,
    num_stages: int = 2,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of q [sequences, heads, tokens, head_dim] over k and v [sequences, kv_heads, tokens, head_dim],
    all contiguous; head_dim is a power of two from 16 on. Returns the output like q and the log-sum-exp
    [sequences, heads, tokens] float32."""
    sequences, heads, tokens, head_dim = q.shape
    kv_heads = k.shape[1]
    assert all(x.is_contiguous() for x in (q, k, v)), "tensors are contiguous"
    assert k.shape == v.shape == (sequences, kv_heads, tokens, head_dim), f"k and v of {tuple(k.shape)} do not fit q"
    assert q.dtype == k.dtype == v.dtype, "q, k and v are of one dtype"
    assert heads % kv_heads == 0, f"{heads} heads cannot share {kv_heads} KV heads evenly"
    assert head_dim >= HEAD_DIM_MIN, f"head_dim {head_dim} is below {HEAD_DIM_MIN}"
    assert head_dim.bit_count() == 1, f"head_dim {head_dim} is no power of two"
    output = torch.empty_like(q)
    unfinished = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    lse, maxima, sums = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(3))
    _kv_outer_attention[(sequences * heads,)](
        q,
        k,
        v,
        output,
        lse,
        unfinished,
        maxima,
        sums,
        tokens,
        heads,
        heads // kv_heads,
        scale,
        HEAD_DIM=head_dim,
        TILE_QUERIES=tile_queries,
        TILE_KEYS=tile_keys,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return output, lse
