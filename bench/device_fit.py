"""From measured rows to a device profile: rooflines from the fastest rows, grids filled by a Gaussian process.

The process learns log(measured / roofline) from scattered rows and is read out at every point of the grid that ships.
Its coordinates and kernels were chosen on a part of the rows to fit, never on the rows held out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import inf

import numpy as np

from bench.gaussian_process import Floats, Kernel, Process
from bench.operator_rows import COLLECTIVES, Rows
from cluster.planning.operators import (
    Attention,
    Collective,
    Curve,
    DecodeAttention,
    Gemm,
    Grid,
    PrefillAttention,
    Roofline,
)

GEMM_KERNEL = Kernel((4.0, 3.5, 6.0, 4.0, 3.0, 3.0, 1.0), 0.005)
ATTENTION_KERNEL = Kernel((4.0, 4.0, 4.0, 4.0, 1.0), 0.001)
COLLECTIVE_KERNEL = Kernel((8.0, 1.2, 4.0, 2.0, 2.0, 2.0, 2.0, 2.0), 0.001)
# Between these, one token more or less changes nothing that the rows show.
SKIPPED_M = (3, 5, 6, 7, 9, 10, 11, 13, 14, 15)
BATCHES = tuple(float(2**i) for i in range(12))
KV_HEADS = (1.0, 2.0, 4.0, 8.0)
GROUPS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0)
# The share of rows that are allowed to be faster than the roofline: they may have been helped by a cache or by a clock.
FASTEST = 0.98
# Bytes that no cache holds.
UNCACHED_BYTES = 2e8


@dataclass(frozen=True, slots=True)
class Silicon:
    """What a fit must be told. `units`: multiprocessors. `wave_power`: see Gemm.

    `cache_bytes`: second-level cache that the attention benchmark's KV stays in; `cached_weights`: elements of a weight
    matrix up to which repeated products find it there. 0 where the rows show no such step. `nccl_from_bytes`: from this
    size on vLLM hands its all-reduce to NCCL: 8 MiB for its own kernel, 64 MiB for symmetric memory on Hopper.
    """

    units: int
    wave_power: float = 0.0
    cache_bytes: float = 0.0
    cached_weights: float = 0.0
    nccl_from_bytes: float = inf


def fit_roofline(flops: Floats, bytes_moved: Floats, seconds: Floats, cache_bytes: float = 0.0) -> Roofline:
    """Rates that FASTEST of the rows do not exceed, and the time of the quickest ones as latency."""
    latency_s = float(np.quantile(seconds, 1 - FASTEST))
    flops_s = float(np.quantile(flops / seconds, FASTEST))
    large = bytes_moved > UNCACHED_BYTES
    bytes_s = float(np.quantile((bytes_moved / seconds)[large], FASTEST))
    if not cache_bytes:
        return Roofline(flops_s, bytes_s, latency_s)
    inside = bytes_moved <= cache_bytes
    cached_bytes_s = float(np.quantile((bytes_moved / seconds)[inside], FASTEST))
    return Roofline(flops_s, bytes_s, latency_s, cache_bytes, cached_bytes_s)


def fit_gemm(rows: Rows, silicon: Silicon, axes: Sequence[Sequence[float]] | None = None) -> Gemm:
    """`axes`: the grid's m, n and k; those of the rows when not given."""
    m, n, k = rows.columns.T
    peak = fit_roofline(2 * m * n * k, 2 * (m * k + k * n + m * n), rows.seconds)
    plain = Gemm(peak, None, 2, silicon.units, silicon.wave_power)
    if axes is None:
        every_m, every_n, every_k = (sorted(set(column)) for column in rows.columns.T)
        axes = [each for each in every_m if each not in SKIPPED_M], every_n, every_k
    points = np.array(list(product(*axes)))
    process = gemm_process(plain, rows, silicon)
    grid = Grid(tuple(map(tuple, axes)), tuple(process.at(gemm_features(points, silicon))))
    return Gemm(peak, grid, 2, silicon.units, silicon.wave_power)


def gemm_process(plain: Gemm, rows: Rows, silicon: Silicon) -> Process:
    return Process(GEMM_KERNEL, gemm_features(rows.columns, silicon), log_ratios(plain.roofline_s, rows))


def gemm_features(points: Floats, silicon: Silicon) -> Floats:
    """log2 of m (half as far apart up to 256 rows, where weights are read whatever m), n and k; whether m is 1 (another
    kernel); the waves of two tile shapes, as far as there are enough tiles to make waves; and on which side of the step
    at `cached_weights` a product lies, which the rows blur over half an octave."""
    m, n, k = points.T
    log_m = np.log2(m)
    log_m = np.where(m < 256, log_m / 2, log_m - 4)
    many = np.clip((np.log2(m * n) - 17) / 2, 0, 1)
    waves = [np.log2(_wave(m, n, silicon.units, *tile)) * many for tile in ((128, 256), (128, 128))]
    step = np.zeros_like(m)
    if silicon.cached_weights:
        step = 2 * np.clip(np.log2(n * k / silicon.cached_weights) / 0.6 + 0.5, 0, 1) * (m <= 1024)
    return np.stack([log_m, np.log2(n), np.log2(k), (m == 1) * 1.0, *waves, step], axis=1)


def _wave(m: Floats, n: Floats, units: int, rows: int, columns: int) -> Floats:
    tiles = np.ceil(m / rows) * np.ceil(n / columns)
    return np.asarray(np.ceil(tiles / units) * units * rows * columns / (m * n))


def fit_attention(kind: type[Attention], rows: Rows, silicon: Silicon) -> Attention:
    """`kind`: PrefillAttention or DecodeAttention."""
    batch, tokens, heads, kv_heads, head_dim = rows.columns.T
    is_prefill = kind is PrefillAttention
    pairs = tokens * (tokens + 1) / 2 if is_prefill else tokens
    vectors = 2 * tokens * (heads + kv_heads) if is_prefill else 2 * tokens * kv_heads + 2 * heads
    flops, bytes_moved = 4 * batch * heads * head_dim * pairs, 2 * batch * head_dim * vectors
    cache_bytes = 0.0 if is_prefill else silicon.cache_bytes
    plain = kind(fit_roofline(flops, bytes_moved, rows.seconds, cache_bytes))
    axes = (tuple(sorted(set(tokens))), BATCHES, KV_HEADS, GROUPS)
    points = np.array(list(product(*axes)))
    process = Process(ATTENTION_KERNEL, _attention_features(*_streams(rows.columns)), _attention_logs(plain, rows))
    values = process.at(_attention_features(*points.T))
    return kind(plain.roofline, Grid(axes, tuple(values)))


def attention_s(operator: Attention, row: Sequence[float]) -> float:
    """What an operator says for a row's columns."""
    batch, tokens, heads, kv_heads, head_dim = (int(each) for each in row)
    if isinstance(operator, PrefillAttention):
        return operator.seconds(tokens, 0, heads, kv_heads, head_dim, batch)
    assert isinstance(operator, DecodeAttention)
    return operator.seconds(tokens, heads, kv_heads, head_dim, batch)


def _attention_logs(plain: Attention, rows: Rows) -> Floats:
    return np.array([np.log(s / attention_s(plain, row)) for row, s in zip(rows.columns, rows.seconds, strict=True)])


def _streams(columns: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """(tokens, batch, KV heads, group) as Attention looks them up: KV heads beyond its grid are more sequences."""
    batch, tokens, heads, kv_heads, _ = columns.T
    known = np.minimum(kv_heads, KV_HEADS[-1])
    return tokens, batch * kv_heads / known, known, heads / kv_heads


def _attention_features(tokens: Floats, batch: Floats, kv_heads: Floats, group: Floats) -> Floats:
    """Logarithms, and whether each head has its own KV: kernels pack the heads of a group, and split a context among
    multiprocessors only when they do."""
    return np.stack([np.log2(tokens), np.log2(batch), np.log2(kv_heads), np.log2(group), (group == 1) * 1.0], axis=1)


def log_ratios(roofline_s: object, rows: Rows) -> Floats:
    assert callable(roofline_s)
    return np.array([np.log(s / roofline_s(*row)) for row, s in zip(rows.columns.tolist(), rows.seconds, strict=True)])


def fit_collectives(rows: Rows, link_bytes_s: float, silicon: Silicon) -> Mapping[str, Collective]:
    """Curves of every kind and number of ranks over powers of two of bytes, one process for all of them: what one curve
    lacks is taken from its neighbours."""
    latency_s = float(np.quantile(rows.seconds, 1 - FASTEST))
    link = Roofline(1.0, link_bytes_s, latency_s)
    values = np.log(rows.seconds / _ring_s(link, rows.columns))
    process = Process(COLLECTIVE_KERNEL, _collective_features(rows.columns, silicon), values)
    sizes = 2.0 ** np.arange(np.log2(rows.columns[:, 2].min()), np.log2(rows.columns[:, 2].max()) + 0.5)
    result: dict[str, Collective] = {}
    for number, kind in enumerate(COLLECTIVES):
        curves = []
        for ranks in sorted(set(rows.columns[:, 1])):
            points = np.array([[number, ranks, size] for size in sizes])
            seconds = np.exp(process.at(_collective_features(points, silicon))) * _ring_s(link, points)
            curves.append((int(ranks), Curve(tuple(sizes), tuple(seconds))))
        result[kind] = Collective(link, tuple(curves))
    return result


def _ring_s(link: Roofline, columns: Floats) -> Floats:
    """Every rank's share goes round once, for an all-reduce twice."""
    kinds, ranks, sizes = columns.T
    rounds = np.where(np.array(["all_reduce" in kind for kind in COLLECTIVES])[kinds.astype(int)], 2.0, 1.0)
    return np.asarray(link.latency_s + rounds * (ranks - 1) / ranks * sizes / link.bytes_s)


def _collective_features(columns: Floats, silicon: Silicon) -> Floats:
    """log2 of bytes and ranks, whether elements have 1 byte, and one coordinate for each kind."""
    kinds, ranks, sizes = columns.T
    is_handed_on = (kinds == COLLECTIVES.index("all_reduce")) & (sizes >= silicon.nccl_from_bytes)
    kinds = np.where(is_handed_on, COLLECTIVES.index("nccl_all_reduce"), kinds)
    names = [kind.removesuffix("_1_byte") for kind in COLLECTIVES]
    own = np.array([[float(name == other) for other in COLLECTIVES[:5]] for name in names])
    is_byte = np.array([float(kind.endswith("_1_byte")) for kind in COLLECTIVES])
    number = kinds.astype(int)
    return np.column_stack([np.log2(sizes), np.log2(ranks), is_byte[number], own[number]])
