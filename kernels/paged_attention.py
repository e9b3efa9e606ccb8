"""Causal attention over a paged cache, in torch.

Rows of one token (decode) are gathered into one padded batch; longer rows (prefill) go one by one, as

    [0 ............ start)[start ....... context)
    | gathered, no mask  | fresh k and v, causal |     merged by their log-sum-exps

so that a chunk's own keys are never read back from the cache and no mask is built. With a sliding window that reaches
into the row, all keys it can see are gathered and masked instead.

What a batch needs in every layer alike (gather indices, masks) is computed once and kept in `batch.plans`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.attention_batch import AttentionBatch, Span

# Padding is split off when it would more than double the tokens gathered.
PADDING_RATIO_MAX = 2


@dataclass(frozen=True, slots=True, eq=False)
class DecodeGroup:
    """Rows of one token, padded to the same number of gathered tokens `width`."""

    tokens: torch.Tensor  # [n], which tokens of the batch
    block_rows: torch.Tensor  # [n * blocks], K rows of the layer seen as [num_blocks * 2, ...]; V is one row further
    dead: torch.Tensor  # which of the n * width gathered tokens lie outside their row's context or window
    mask: torch.Tensor | None  # [n, 1, 1, width], 0 or -inf; None when nothing is dead
    width: int


@dataclass(frozen=True, slots=True, eq=False)
class PrefillRow:
    """A row of several tokens. `block_rows` gathers tokens [first, first + width) of its context."""

    span: Span
    block_rows: torch.Tensor
    offset: int  # of the first token wanted in the gathered blocks
    width: int
    mask: torch.Tensor | None  # [queries, width]; None: the gathered tokens are all visible and precede the new ones


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    decode: tuple[DecodeGroup, ...]
    prefill: tuple[PrefillRow, ...]


def paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_layer: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every new token attends to its row's tokens up to itself, the last `window` of them if given.

    q [tokens, heads, head_dim]; k, v [tokens, kv_heads, head_dim] are the batch's own, and must be in the cache
    already. Head h reads KV head h // (heads / kv_heads). Returns the output [tokens, heads, head_dim] in q's dtype and
    the log-sum-exp of the scaled scores [tokens, heads] in float32 (float64 for float64).
    """
    plan = _plan(batch, window, q.dtype, kv_layer.shape[1])
    kv_heads = k.shape[1]
    grouped = q.view(q.shape[0], kv_heads, -1, q.shape[2])
    output = torch.empty_like(grouped, memory_format=torch.contiguous_format)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.empty(grouped.shape[:3], dtype=lse_dtype, device=q.device)
    for group in plan.decode:
        output[group.tokens], lse[group.tokens] = _attend_decode(grouped[group.tokens], kv_layer, group, scale)
    for row in plan.prefill:
        tokens = slice(row.span.query_start, row.span.query_start + row.span.query_count)
        output[tokens], lse[tokens] = _attend_prefill(grouped[tokens], k[tokens], v[tokens], kv_layer, row, scale)
    return output.view(q.shape), lse.view(q.shape[:2])


def merge(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Joins attention over two disjoint sets of keys: each is (output [..., head_dim], log-sum-exp [...])."""
    lse = torch.logaddexp(first[1], second[1])
    weights = ((part[1] - lse).exp_().unsqueeze(-1) for part in (first, second))
    output = sum(part[0] * weight for part, weight in zip((first, second), weights, strict=True))
    assert isinstance(output, torch.Tensor)
    return output.to(first[0].dtype), lse


def attend_math(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as matrix products, on any device: (output like q, log-sum-exp [..., queries]).

    q [..., queries, head_dim]; k, v [..., keys, head_dim]; `mask` is added to the scores. `causal` wants as many keys
    as queries. Holds all scores at once.
    """
    # Scores rounded to 16 bits would cost more precision than all the rest together.
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * scale
    if mask is not None:
        scores = scores + mask
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    lse = scores.logsumexp(-1)
    return (scores - lse.unsqueeze(-1)).exp_().to(v.dtype) @ v, lse


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_math`, by torch's blocked CPU kernel where it can be had: the public function hides its log-sum-exp."""
    if q.device.type != "cpu":
        return attend_math(q, k, v, causal, mask, scale)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scale
    )
    return output, lse


def _attend_decode(
    q: torch.Tensor, kv_layer: torch.Tensor, group: DecodeGroup, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [n, kv_heads, group, head_dim]: the heads that share a KV head stand where queries usually do."""
    k, v = _gather(kv_layer, group.block_rows)
    # A masked score still multiplies its value by 0, and 0 * NaN is NaN: what no one wrote must not be read.
    k.view(-1, *k.shape[2:]).index_fill_(0, group.dead, 0)
    v.view(-1, *v.shape[2:]).index_fill_(0, group.dead, 0)
    k, v = (x.view(q.shape[0], group.width, *x.shape[2:]).transpose(1, 2) for x in (k, v))
    return _attend(q, k, v, False, group.mask, scale)


def _attend_prefill(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_layer: torch.Tensor, row: PrefillRow, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [queries, kv_heads, group, head_dim]; k, v [queries, kv_heads, head_dim]."""
    group = q.shape[2]
    q = q.permute(1, 2, 0, 3)
    own = None
    if row.mask is None:
        own = _attend(q, _by_head(k, group), _by_head(v, group), True, None, scale)
    if row.width == 0:
        assert own is not None, "a row without a mask sees its own keys"
        output, lse = own
    else:
        blocks = _gather(kv_layer, row.block_rows)
        cut = slice(row.offset, row.offset + row.width)
        past_k, past_v = (_by_head(x.view(-1, *x.shape[2:])[cut], group) for x in blocks)
        past = _attend(q, past_k, past_v, False, row.mask, scale)
        output, lse = past if own is None else merge(past, own)
    return output.permute(2, 0, 1, 3), lse.permute(2, 0, 1)


def _by_head(x: torch.Tensor, group: int) -> torch.Tensor:
    """[keys, kv_heads, head_dim] → [kv_heads, group, keys, head_dim], a view: shared heads are not copied."""
    return x.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)


def _gather(kv_layer: torch.Tensor, block_rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of some blocks, each [blocks, block_size, kv_heads, head_dim]."""
    halves = kv_layer.view(kv_layer.shape[0] * 2, -1)
    shape = (len(block_rows), *kv_layer.shape[2:])
    return halves.index_select(0, block_rows).view(shape), halves.index_select(0, block_rows + 1).view(shape)


def _plan(batch: AttentionBatch, window: int | None, dtype: torch.dtype, halves: int) -> Plan:
    assert halves == 2, "a layer's cache is [num_blocks, 2, ...]"
    plan = batch.plans.get((window, dtype))
    if plan is None:
        decode_rows = [row for row, span in enumerate(batch.spans) if span.query_count == 1]
        plan = Plan(
            tuple(_decode_group(batch, rows, window, dtype) for rows in _split_by_padding(batch, decode_rows)),
            tuple(
                _prefill_row(batch, row, window, dtype) for row, span in enumerate(batch.spans) if span.query_count > 1
            ),
        )
        batch.plans[(window, dtype)] = plan
    assert isinstance(plan, Plan)
    return plan


def _split_by_padding(batch: AttentionBatch, rows: list[int]) -> list[list[int]]:
    """One group, or one for each power of two of the context when lengths differ so much that padding dominates."""
    contexts = [batch.spans[row].context for row in rows]
    if not rows or max(contexts) * len(rows) <= PADDING_RATIO_MAX * sum(contexts):
        return [rows] if rows else []
    groups: dict[int, list[int]] = {}
    for row, context in zip(rows, contexts, strict=True):
        groups.setdefault(-(-context // batch.block_size).bit_length(), []).append(row)
    return list(groups.values())


def _decode_group(batch: AttentionBatch, rows: list[int], window: int | None, dtype: torch.dtype) -> DecodeGroup:
    size, device = batch.block_size, batch.slots.device
    spans = [batch.spans[row] for row in rows]
    firsts = [0 if window is None else max(0, span.context - window) for span in spans]
    blocks = max(-(-span.context // size) - first // size for span, first in zip(spans, firsts, strict=True))
    width = blocks * size
    first_blocks = torch.tensor([first // size for first in firsts], device=device)
    columns = first_blocks[:, None] + torch.arange(blocks, device=device)
    table = batch.block_tables[torch.tensor(rows, device=device)]
    # A row near the end of the table has fewer blocks than the widest: its padding may name any block.
    block_ids = table.gather(1, columns.clamp_max(table.shape[1] - 1))
    places = first_blocks[:, None] * size + torch.arange(width, device=device)
    contexts = torch.tensor([span.context for span in spans], device=device)
    dead = (places >= contexts[:, None]) | (places < torch.tensor(firsts, device=device)[:, None])
    dead_tokens = dead.flatten().nonzero().flatten()
    mask = torch.zeros(dead.shape, dtype=dtype, device=device).masked_fill_(dead, float("-inf"))[:, None, None, :]
    tokens = torch.tensor([span.query_start for span in spans], device=device)
    return DecodeGroup(tokens, block_ids.flatten() * 2, dead_tokens, mask if len(dead_tokens) else None, width)


def _prefill_row(batch: AttentionBatch, row: int, window: int | None, dtype: torch.dtype) -> PrefillRow:
    size, device = batch.block_size, batch.slots.device
    span = batch.spans[row]
    masked = window is not None and window < span.context
    first = max(0, span.start + 1 - window) if masked and window is not None else 0
    last = span.context if masked else span.start
    block_ids = batch.block_tables[row, first // size : -(-last // size)]
    mask = None
    if masked and window is not None:
        queries = torch.arange(span.start, span.context, device=device)[:, None]
        keys = torch.arange(first, last, device=device)[None, :]
        hidden = (keys > queries) | (keys <= queries - window)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
    return PrefillRow(span, block_ids * 2, first % size, last - first, mask)
