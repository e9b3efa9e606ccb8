"""The cases of bench/kernels.py, those that docs/performance.md has targets for first."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain

import torch

from bench.attention_cases import decode_case, prefill_case
from bench.kernel_case import Case, Sizes
from bench.sampling_cases import sampling_cases
from kernels import torch_ops
from kernels.attention_batch import build_attention_batch
from kernels.gpu import ops


def cases(sizes: Sizes) -> Iterator[Case]:
    """One at a time: each frees its memory before the next is made."""
    scaled = sizes.scaled
    # Compiling flex_attention takes long, and every shape anew.
    flex = sizes.device.type == "cuda"
    yield decode_case(sizes, scaled(64), scaled(4096), flex=flex)
    yield decode_case(sizes, scaled(64), scaled(2047))
    yield prefill_case(sizes, scaled(8), scaled(4096), scaled(4096), flex=flex)
    yield from copy_cases(sizes, max(sizes.block_size, scaled(2048)))
    for batch, context in ((1, 4096), (8, 32768), (256, 1024)):
        yield decode_case(sizes, scaled(batch), scaled(context))
    if flex:
        yield decode_case(sizes, 64, 4096, kv_dtype=torch.float8_e4m3fn)
    for new, context in ((2048, 2048), (512, 8192)):
        yield prefill_case(sizes, 1, scaled(new), scaled(context))
    yield from chain.from_iterable(sampling_cases(sizes, scaled(batch)) for batch in (64, 1))
    yield from chain.from_iterable(small_cases(sizes, scaled(tokens)) for tokens in (64, 4096))


def copy_cases(sizes: Sizes, tokens: int) -> Iterator[Case]:
    """The two ends of the KV stream: all layers of so many tokens."""
    blocks = tokens // sizes.block_size
    kv = sizes.randn(sizes.layers, 2 * blocks, 2, sizes.block_size, sizes.kv_heads, sizes.head_dim)
    block_ids = torch.randperm(2 * blocks, device=sizes.device)[:blocks]
    layers = range(sizes.layers)
    staging = torch_ops.gather_blocks(kv, block_ids, layers, sizes.block_size)
    yield Case(
        f"gather {tokens} tokens x {sizes.layers} layers",
        partial(ops.gather_blocks, kv, block_ids, layers, sizes.block_size),
        moved=2 * staging.nbytes,
        peers={"torch": partial(torch_ops.gather_blocks, kv, block_ids, layers, sizes.block_size)},
    )
    yield Case(
        f"scatter {tokens} tokens x {sizes.layers} layers",
        partial(ops.scatter_blocks, kv, block_ids, 0, layers, staging),
        moved=2 * staging.nbytes,
        peers={"torch": partial(torch_ops.scatter_blocks, kv, block_ids, 0, layers, staging)},
    )


def small_cases(sizes: Sizes, tokens: int) -> Iterator[Case]:
    """The operations between matrix products, beside torch's eager ones."""
    x, residual = sizes.randn(tokens, sizes.hidden), sizes.randn(tokens, sizes.hidden)
    weight = sizes.randn(sizes.hidden)
    yield Case(
        f"rms_norm with residual, {tokens} tokens",
        partial(ops.rms_norm, x, weight, 1e-5, residual),
        moved=4 * x.nbytes,
        peers={"torch": partial(torch_ops.rms_norm, x, weight, 1e-5, residual)},
    )
    gate_up = sizes.randn(tokens, 2 * sizes.intermediate)
    yield Case(
        f"silu_mul, {tokens} tokens",
        partial(ops.silu_mul, gate_up),
        moved=gate_up.nbytes * 3 // 2,
        peers={"torch": partial(torch_ops.silu_mul, gate_up)},
    )
    blocks = -(-tokens // sizes.block_size)
    kv = sizes.randn(blocks, 2, sizes.block_size, sizes.kv_heads, sizes.head_dim)
    batch = build_attention_batch([(0, tokens, range(blocks))], sizes.block_size, sizes.device)
    qkv = sizes.randn(tokens, sizes.heads + 2 * sizes.kv_heads, sizes.head_dim)
    q, k, v = torch.split(qkv, [sizes.heads, sizes.kv_heads, sizes.kv_heads], dim=1)
    table = torch.randn(tokens, sizes.head_dim, device=sizes.device)
    yield Case(
        f"rope_store, {tokens} tokens",
        partial(ops.rope_store, q, k, v, batch.positions, table, kv, batch.slots),
        moved=2 * qkv.nbytes,
        peers={"torch": partial(torch_ops.rope_store, q, k, v, batch.positions, table, kv, batch.slots)},
    )
