"""Operator times: a roofline with fitted constants, corrected by what was measured.

    seconds = (max(flops / flops_s, bytes / bytes_s) + latency_s) * correction(coordinates)

The correction is the ratio measured / roofline on a compact grid, interpolated linearly between the logarithms of the
coordinates; outside the grid the nearest edge holds, so that far away the roofline alone gives the shape (Williams et
al., Roofline, 2009). An operator without a grid is its roofline. Plain floats throughout: a call takes microseconds.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import ceil, exp, log, prod, sqrt


@dataclass(frozen=True, slots=True)
class Roofline:
    """Peak rates as fitted, and what a call costs that has nothing to do.

    Up to `cache_bytes` move at `cached_bytes_s`: a benchmark that repeats an input finds it in the second-level cache.
    """

    flops_s: float
    bytes_s: float
    latency_s: float = 0.0
    cache_bytes: float = 0.0
    cached_bytes_s: float = 0.0

    def seconds(self, flops: float, bytes_moved: float) -> float:
        bytes_s = self.bytes_s if bytes_moved > self.cache_bytes else self.cached_bytes_s
        return max(flops / self.flops_s, bytes_moved / bytes_s if bytes_moved else 0.0) + self.latency_s


@dataclass(frozen=True, slots=True)
class Grid:
    """Logarithms of measured / roofline at every point of a grid. `values` is row-major: the last axis runs fastest."""

    axes: tuple[tuple[float, ...], ...]
    values: tuple[float, ...]
    logs: tuple[tuple[float, ...], ...] = field(init=False, repr=False, compare=False)
    strides: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert all(axis and list(axis) == sorted(set(axis)) and axis[0] > 0 for axis in self.axes), "axes rise above 0"
        assert len(self.values) == prod(map(len, self.axes)), "one value per grid point"
        strides = tuple(prod(len(axis) for axis in self.axes[i + 1 :]) for i in range(len(self.axes)))
        object.__setattr__(self, "logs", tuple(tuple(map(log, axis)) for axis in self.axes))
        object.__setattr__(self, "strides", strides)

    @classmethod
    def measured(
        cls, axes: Sequence[Sequence[float]], measured_s: Callable[..., float], roofline_s: Callable[..., float]
    ) -> Grid:
        """A grid from a time for every one of its points and the roofline that it corrects."""
        values = tuple(log(measured_s(*point) / roofline_s(*point)) for point in product(*axes))
        return cls(tuple(map(tuple, axes)), values)

    def log_correction(self, *coordinates: float) -> float:
        """The logarithm of measured / roofline at a point, all of whose coordinates are above 0."""
        corners = [(0, 1.0)]
        for axis, logs, stride, value in zip(self.axes, self.logs, self.strides, coordinates, strict=True):
            below, share = bracket(axis, logs, value)
            above = [(at + (below + 1) * stride, weight * share) for at, weight in corners] if share else []
            corners = [(at + below * stride, weight * (1.0 - share)) for at, weight in corners] + above
        return sum(self.values[at] * weight for at, weight in corners)


def bracket(axis: Sequence[float], logs: Sequence[float], value: float) -> tuple[int, float]:
    """(index of the point at or below, share of the way to the next one in logarithms); held at both ends."""
    if value <= axis[0]:
        return 0, 0.0
    if value >= axis[-1]:
        return len(axis) - 1, 0.0
    below = bisect_right(axis, value) - 1
    return below, (log(value) - logs[below]) / (logs[below + 1] - logs[below])


# Output tiles of a matrix product and how fast a multiprocessor fills each, relative to the largest. Found by the
# scatter that they leave in A100 and L40S rows (bench/device_files.py).
TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.8), (64, 128, 0.65), (128, 64, 0.65), (64, 64, 0.45))
# Results kept per operator; a model asks for the same few shapes again and again.
MEMO_SIZE = 1 << 16


def wave_excess(m: float, n: float, units: int) -> float:
    """How much longer a product takes than its flops say, because tiles run in whole waves over `units`
    multiprocessors: the last wave costs as much as a full one. At least about 1, under the best of TILES."""
    filled = min(ceil(ceil(m / rows) * ceil(n / columns) / units) * rows * columns / e for rows, columns, e in TILES)
    return filled * units / (m * n)


@dataclass(frozen=True, slots=True)
class Gemm:
    """[m, k] x [k, n]. Grid axes: m, n, k.

    `wave_power`: the flops count wave_excess ** wave_power times; 0 where the library evens out the waves (Hopper).
    """

    roofline: Roofline
    grid: Grid | None = None
    element_bytes: int = 2
    units: int = 1
    wave_power: float = 0.0
    memo: dict[tuple[int, int, int], float] = field(default_factory=dict, repr=False, compare=False)

    def roofline_s(self, m: float, n: float, k: float) -> float:
        flops = 2.0 * m * n * k
        if self.wave_power:
            flops *= wave_excess(m, n, self.units) ** self.wave_power
        return self.roofline.seconds(flops, self.element_bytes * (m * k + k * n + m * n))

    def seconds(self, m: int, n: int, k: int) -> float:
        known = self.memo.get((m, n, k))
        if known is not None:
            return known
        seconds = self.roofline_s(m, n, k)
        if self.grid is not None:
            seconds *= exp(self.grid.log_correction(m, n, k))
        if len(self.memo) >= MEMO_SIZE:
            self.memo.clear()
        self.memo[m, n, k] = seconds
        return seconds


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention of equal sequences. Grid axes: tokens, batch, KV heads, heads per KV head.

    More KV heads than the grid has count as more sequences: a kernel treats both alike.
    """

    roofline: Roofline
    grid: Grid | None = None
    element_bytes: int = 2

    def corrected_s(self, base_s: float, tokens: float, batch: float, num_heads: int, num_kv_heads: int) -> float:
        if self.grid is None:
            return base_s
        known_heads = min(float(num_kv_heads), self.grid.axes[2][-1])
        sequences = batch * num_kv_heads / known_heads
        return base_s * exp(self.grid.log_correction(tokens, sequences, known_heads, num_heads / num_kv_heads))


class PrefillAttention(Attention):
    """Causal attention of `tokens` new tokens over themselves and a context before them.

    Rows with a context were not measured. They get the correction of the prompt that has as many pairs of tokens.
    """

    __slots__ = ()

    def roofline_s(
        self, tokens: float, context: float, num_heads: float, num_kv_heads: float, head_dim: float, batch: float
    ) -> float:
        pairs = tokens * (context + (tokens + 1) / 2)
        vectors = 2 * tokens * num_heads + 2 * (context + tokens) * num_kv_heads
        flops = 4.0 * batch * num_heads * head_dim * pairs
        return self.roofline.seconds(flops, self.element_bytes * batch * vectors * head_dim)

    def seconds(
        self, tokens: int, context: int, num_heads: int, num_kv_heads: int, head_dim: int, batch: int = 1
    ) -> float:
        base_s = self.roofline_s(tokens, context, num_heads, num_kv_heads, head_dim, batch)
        return self.corrected_s(base_s, sqrt(tokens * (tokens + 2 * context)), batch, num_heads, num_kv_heads)


class DecodeAttention(Attention):
    """One new token for each of `batch` rows; `tokens`: the mean context of a row, its new token included."""

    __slots__ = ()

    def roofline_s(self, tokens: float, num_heads: float, num_kv_heads: float, head_dim: float, batch: float) -> float:
        vectors = 2 * tokens * num_kv_heads + 2 * num_heads
        flops = 4.0 * batch * num_heads * head_dim * tokens
        return self.roofline.seconds(flops, self.element_bytes * batch * vectors * head_dim)

    def seconds(self, tokens: float, num_heads: int, num_kv_heads: int, head_dim: int, batch: int) -> float:
        base_s = self.roofline_s(tokens, num_heads, num_kv_heads, head_dim, batch)
        return self.corrected_s(base_s, tokens, batch, num_heads, num_kv_heads)


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds against bytes of one collective among one number of ranks, straight between logarithms.

    Below the first point its time holds (latency), above the last one time grows with the bytes (bandwidth).
    """

    sizes_bytes: tuple[float, ...]
    seconds: tuple[float, ...]

    def at(self, size_bytes: float) -> float:
        sizes, times = self.sizes_bytes, self.seconds
        if size_bytes <= sizes[0]:
            return times[0]
        if size_bytes >= sizes[-1]:
            return times[-1] * size_bytes / sizes[-1]
        below = bisect_right(sizes, size_bytes) - 1
        share = log(size_bytes / sizes[below]) / log(sizes[below + 1] / sizes[below])
        return float(times[below] * (times[below + 1] / times[below]) ** share)


@dataclass(frozen=True, slots=True)
class Collective:
    """Curves by number of ranks: between two known numbers straight in the logarithm, beyond them the nearest one's.

    Without curves it is an all-reduce as a ring: 2 (ranks - 1) / ranks of the bytes over the link, and its latency for
    each of 2 (ranks - 1) hops.
    """

    link: Roofline
    curves: tuple[tuple[int, Curve], ...] = ()

    def seconds(self, size_bytes: float, ranks: int) -> float:
        if ranks <= 1 or size_bytes <= 0:
            return 0.0
        if not self.curves:
            moved = 2 * (ranks - 1) / ranks * size_bytes
            return moved / self.link.bytes_s + 2 * (ranks - 1) * self.link.latency_s
        known = [float(count) for count, _ in self.curves]
        below, share = bracket(known, [log(count) for count in known], ranks)
        seconds = self.curves[below][1].at(size_bytes)
        if not share:
            return seconds
        return float(seconds * (self.curves[below + 1][1].at(size_bytes) / seconds) ** share)
