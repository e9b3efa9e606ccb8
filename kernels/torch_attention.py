"""Causal attention over a paged cache, in torch.

Rows of one token (decode) are gathered into one padded batch; longer rows (prefill) go one by one, as

    [0 ............ start)[start ....... context)
    |  all, no mask       | own keys, causal    |     merged by their log-sum-exps

so that no mask is built. With a sliding window that reaches into the row, all keys it can see are masked instead.

What a batch needs in every layer alike (gather indices, masks) is computed once and kept in `batch.plans`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.attention_batch import AttentionBatch, Span
from kernels.attention_variant import AttentionVariant

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
    """A row of several tokens. `block_rows` gathers tokens [first, context) of its context, `offset` into them."""

    span: Span
    block_rows: torch.Tensor
    offset: int
    first: int
    mask: torch.Tensor | None  # [queries, context - first]; None: every token sees all before it


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    decode: tuple[DecodeGroup, ...]
    prefill: tuple[PrefillRow, ...]


def paged_attention(
    q: torch.Tensor, kv_layer: torch.Tensor, batch: AttentionBatch, variant: AttentionVariant
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Ops.paged_attention` in kernels/ops.py. The log-sum-exp is float64 for float64."""
    plan = _plan(batch, variant, q.dtype)
    grouped = q.view(q.shape[0], kv_layer.shape[3], -1, q.shape[2])
    output = torch.zeros_like(grouped, memory_format=torch.contiguous_format)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.full(grouped.shape[:3], float("-inf"), dtype=lse_dtype, device=q.device)
    for group in plan.decode:
        attended = _attend_decode(grouped[group.tokens], kv_layer, group, variant)
        output[group.tokens], lse[group.tokens] = attended[0], attended[1].to(lse_dtype)
    for row in plan.prefill:
        tokens = slice(row.span.query_start, row.span.query_start + row.span.query_count)
        output[tokens], lse[tokens] = _attend_prefill(grouped[tokens], kv_layer, row, variant)
    output, lse = output.view(q.shape), lse.view(q.shape[:2])
    return (output, lse) if variant.sink_logits is None else _add_sink(output, lse, variant.sink_logits)


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
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    mask: torch.Tensor | None,
    variant: AttentionVariant,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as matrix products, on any device: (output like q, log-sum-exp [..., queries]).

    q [..., queries, head_dim]; k, v [..., keys, head_dim]; `mask` is added to the scores. `causal` wants as many keys
    as queries. Of the variant only scale and soft cap matter here. Holds all scores at once.
    """
    # Scores rounded to 16 bits would cost more precision than all the rest together.
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * variant.scale
    if variant.soft_cap is not None:
        scores = scores.div_(variant.soft_cap).tanh_().mul_(variant.soft_cap)
    if mask is not None:
        scores = scores + mask
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    lse = scores.logsumexp(-1)
    return ((scores - lse.unsqueeze(-1)).exp_() @ v.to(wide)).to(q.dtype), lse


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    mask: torch.Tensor | None,
    variant: AttentionVariant,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_math`, by torch's blocked CPU kernel where it can be had: the public function hides its log-sum-exp."""
    if q.device.type != "cpu" or variant.soft_cap is not None:
        return attend_math(q, k, v, causal, mask, variant)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=variant.scale
    )
    return output, lse


def _add_sink(output: torch.Tensor, lse: torch.Tensor, sink_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One more score per head in the denominator. Padding keeps its -inf: nothing was seen, the sink neither."""
    joined = torch.where(lse.isneginf(), lse, torch.logaddexp(lse, sink_logits.to(lse.dtype)))
    share = torch.where(lse.isneginf(), torch.zeros_like(lse), (lse - joined).exp())
    return (output * share.unsqueeze(-1)).to(output.dtype), joined


def _attend_decode(
    q: torch.Tensor, kv_layer: torch.Tensor, group: DecodeGroup, variant: AttentionVariant
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [n, kv_heads, group, head_dim]: the heads that share a KV head stand where queries usually do."""
    k, v = _gather(kv_layer, group.block_rows, q.dtype)
    # A masked score still multiplies its value by 0, and 0 * NaN is NaN: what no one wrote must not be read.
    k.view(-1, *k.shape[2:]).index_fill_(0, group.dead, 0)
    v.view(-1, *v.shape[2:]).index_fill_(0, group.dead, 0)
    k, v = (x.view(q.shape[0], group.width, *x.shape[2:]).transpose(1, 2) for x in (k, v))
    return _attend(q, k, v, False, group.mask, variant)


def _attend_prefill(
    q: torch.Tensor, kv_layer: torch.Tensor, row: PrefillRow, variant: AttentionVariant
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [queries, kv_heads, group, head_dim]."""
    group, end = q.shape[2], row.offset + row.span.context - row.first
    q = q.permute(1, 2, 0, 3)
    k, v = (
        _by_head(x.view(-1, *x.shape[2:])[row.offset : end], group) for x in _gather(kv_layer, row.block_rows, q.dtype)
    )
    past = row.span.start - row.first
    if row.mask is not None:
        output, lse = _attend(q, k, v, False, row.mask, variant)
    else:
        output, lse = _attend(q, k[:, :, past:], v[:, :, past:], True, None, variant)
        if past:
            output, lse = merge(_attend(q, k[:, :, :past], v[:, :, :past], False, None, variant), (output, lse))
    return output.permute(2, 0, 1, 3), lse.permute(2, 0, 1)


def _by_head(x: torch.Tensor, group: int) -> torch.Tensor:
    """[keys, kv_heads, head_dim] → [kv_heads, group, keys, head_dim], a view: shared heads are not copied."""
    return x.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)


def _gather(kv_layer: torch.Tensor, block_rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of some blocks, each [blocks, block_size, kv_heads, head_dim]."""
    # As bytes, because torch selects no rows of float8.
    halves = kv_layer.view(kv_layer.shape[0] * 2, -1).view(torch.uint8)
    shape = (len(block_rows), *kv_layer.shape[2:])
    k, v = (halves.index_select(0, rows).view(kv_layer.dtype).view(shape) for rows in (block_rows, block_rows + 1))
    return k.to(dtype), v.to(dtype)


def _plan(batch: AttentionBatch, variant: AttentionVariant, dtype: torch.dtype) -> Plan:
    key = ("torch", variant.window, variant.sink_tokens, dtype)
    plan = batch.plans.get(key)
    if plan is None:
        # A row of context 0 is padding: it is in no group and keeps its 0.
        decode_rows = [row for row, span in enumerate(batch.spans) if span.query_count == 1 and span.context]
        plan = Plan(
            tuple(_decode_group(batch, rows, variant, dtype) for rows in _split_by_padding(batch, decode_rows)),
            tuple(
                _prefill_row(batch, row, variant, dtype) for row, span in enumerate(batch.spans) if span.query_count > 1
            ),
        )
        batch.plans[key] = plan
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


def _first_seen(position: int, variant: AttentionVariant) -> int:
    """The oldest key that a token at `position` may look at."""
    if variant.window is None or variant.sink_tokens:
        return 0
    return max(0, position + 1 - variant.window)


def _decode_group(batch: AttentionBatch, rows: list[int], variant: AttentionVariant, dtype: torch.dtype) -> DecodeGroup:
    size, device = batch.block_size, batch.slots.device
    spans = [batch.spans[row] for row in rows]
    firsts = [_first_seen(span.context - 1, variant) for span in spans]
    blocks = max(-(-span.context // size) - first // size for span, first in zip(spans, firsts, strict=True))
    width = blocks * size
    first_blocks = torch.tensor([first // size for first in firsts], device=device)
    columns = first_blocks[:, None] + torch.arange(blocks, device=device)
    table = batch.block_tables[torch.tensor(rows, device=device)]
    # A row near the end of the table has fewer blocks than the widest: its padding may name any block.
    block_ids = table.gather(1, columns.clamp_max(table.shape[1] - 1))
    places = first_blocks[:, None] * size + torch.arange(width, device=device)
    contexts = torch.tensor([span.context for span in spans], device=device)[:, None]
    dead = (places >= contexts) | _hidden_by_window(contexts - 1, places, variant)
    dead_tokens = dead.flatten().nonzero().flatten()
    mask = torch.zeros(dead.shape, dtype=dtype, device=device).masked_fill_(dead, float("-inf"))[:, None, None, :]
    tokens = torch.tensor([span.query_start for span in spans], device=device)
    return DecodeGroup(tokens, block_ids.flatten() * 2, dead_tokens, mask if len(dead_tokens) else None, width)


def _prefill_row(batch: AttentionBatch, row: int, variant: AttentionVariant, dtype: torch.dtype) -> PrefillRow:
    size, device = batch.block_size, batch.slots.device
    span = batch.spans[row]
    masked = variant.window is not None and variant.window < span.context
    first = _first_seen(span.start, variant) if masked else 0
    block_ids = batch.block_tables[row, first // size : -(-span.context // size)]
    mask = None
    if masked:
        queries = torch.arange(span.start, span.context, device=device)[:, None]
        keys = torch.arange(first, span.context, device=device)[None, :]
        hidden = (keys > queries) | _hidden_by_window(queries, keys, variant)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
    return PrefillRow(span, block_ids * 2, first % size, first, mask)


def _hidden_by_window(queries: torch.Tensor, keys: torch.Tensor, variant: AttentionVariant) -> torch.Tensor:
    if variant.window is None:
        return torch.zeros((), dtype=torch.bool, device=keys.device)
    return (keys <= queries - variant.window) & (keys >= variant.sink_tokens)
