"""Gumbel noise that is a function of (key, token id) alone: the formula of engine/random_draw.py, inside a kernel.

The hash is the same bit for bit. The logarithms are made of additions, multiplications and correctly rounded divisions
only, so the noise does not depend on a device's own approximation of log, which is too rough near 1: kernels that use
it are launched with `enable_fp_fusion=False` and then give the same bits on every device, and in the interpreter.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
MULTIPLIER_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MULTIPLIER_2 = tl.constexpr(0x94D049BB133111EB)
TWO_TO_MINUS_32 = tl.constexpr(2.0**-32)
W_MAX = tl.constexpr(1.0 - 2.0**-24)
# ln 2 in two parts: the first has few enough bits that its product with an exponent is exact.
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(math.log(2) - 0.693359375)
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)


@triton.jit  # type: ignore[untyped-decorator]
def hash_bits(key: tl.tensor, token_ids: tl.tensor) -> tl.tensor:
    """h(v) of the formula for every v in `token_ids` (int32), as uint32. `key` is an int64 of the key's 64 bits."""
    z = key.to(tl.uint64, bitcast=True) + (token_ids.to(tl.uint64) + 1) * GOLDEN
    z = (z ^ (z >> 30)) * MULTIPLIER_1
    z = (z ^ (z >> 27)) * MULTIPLIER_2
    return ((z ^ (z >> 31)) >> 32).to(tl.uint32)


@triton.jit  # type: ignore[untyped-decorator]
def log_of_sum(u: tl.tensor, c: tl.tensor) -> tl.tensor:
    """log(u + c) within about one unit in the last place, for normal positive u and a correction |c| <= 2^-24 u.

    u = 2^k (1 + f) with 1 + f in [√½, √2), and log(1 + f) = f - s (f - p) where s = f / (2 + f) and
    p = 2 (s²/3 + s⁴/5 + …): the series of 2 artanh(s) less its first term, cut off below 3e-9.
    """
    bits = u.to(tl.int32, bitcast=True)
    k = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0
    s = tl.div_rn(f, 2.0 + f)
    z = s * s
    p = z * (0.6666666666666666 + z * (0.4 + z * (0.2857142857142857 + z * 0.2222222222222222)))
    exponent = k.to(tl.float32)
    return exponent * LN2_HIGH + (f - (s * (f - p) - (exponent * LN2_LOW + c)))


@triton.jit  # type: ignore[untyped-decorator]
def uniform(bits: tl.tensor) -> tl.tensor:
    """w of the formula, float32 inside (0, 1)."""
    return tl.minimum((bits.to(tl.float32) + 0.5) * TWO_TO_MINUS_32, W_MAX)


@triton.jit  # type: ignore[untyped-decorator]
def gumbel_noise(key: tl.tensor, token_ids: tl.tensor) -> tl.tensor:
    """Standard Gumbel noise for every token id, float32."""
    w = uniform(hash_bits(key, token_ids))
    # log1p(-w): what rounding took from 1 - w comes back as a correction, to first order c / u = c (1 + w).
    u = 1.0 - w
    lost = (1.0 - u) - w
    return -log_of_sum(-log_of_sum(u, lost + lost * w), 0.0)
