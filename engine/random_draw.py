"""Counter-based noise: a pure function of (seed, choice, step, token id), so any worker can continue any sequence.

Everything is 64-bit integer arithmetic modulo 2^64 (torch int64 wraps likewise), so that another implementation gives
the same numbers bit for bit:

    mix(z)  =  z ^= z >> 30;  z *= 0xBF58476D1CE4E5B9;  z ^= z >> 27;  z *= 0x94D049BB133111EB;  z ^= z >> 31
    key     =  mix(mix(mix(seed + G) + choice * G + G) + step * G + G)          G = 0x9E3779B97F4A7C15
    h(v)    =  mix(key + (v + 1) * G) >> 32                                     32 bits, shifts are logical
    w(v)    =  min((float32(h) + 0.5) * 2^-32,  1 - 2^-24)                      float32, inside (0, 1)
    noise(v) = -log(-log1p(-w))                                                 float32, standard Gumbel

`mix` is SplitMix64's finalizer (Steele, Lea, Flood 2014). log1p keeps full precision where w is near 0, which is where
the large noise that lets an unlikely token win comes from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)
W_MAX = 1.0 - 2.0**-24


def draw_key(seed: int, choice: int, step: int) -> int:
    """The 64-bit key of one draw."""
    key = _mix(seed + GOLDEN)
    key = _mix(key + choice * GOLDEN + GOLDEN)
    return _mix(key + step * GOLDEN + GOLDEN)


def gumbel_noise(keys: Sequence[int], vocab_size: int, device: torch.device) -> torch.Tensor:
    """[len(keys), vocab_size] float32: standard Gumbel noise for every token id under every key."""
    bits = hash_bits(keys, vocab_size, device)
    uniform = bits.to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_max_(W_MAX)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def hash_bits(keys: Sequence[int], vocab_size: int, device: torch.device) -> torch.Tensor:
    """[len(keys), vocab_size] int64 in [0, 2^32): h(v) of the formula above."""
    counters = torch.arange(1, vocab_size + 1, dtype=torch.int64, device=device) * _signed(GOLDEN)
    z = torch.tensor([_signed(key) for key in keys], dtype=torch.int64, device=device)[:, None] + counters
    for shift, multiplier in zip(SHIFTS[:2], MULTIPLIERS, strict=True):
        z ^= _shift_right(z, shift)
        z *= _signed(multiplier)
    z ^= _shift_right(z, SHIFTS[2])
    return _shift_right(z, 32)


def _mix(z: int) -> int:
    z &= MASK
    z = (z ^ (z >> SHIFTS[0])) * MULTIPLIERS[0] & MASK
    z = (z ^ (z >> SHIFTS[1])) * MULTIPLIERS[1] & MASK
    return z ^ (z >> SHIFTS[2])


def _shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift; torch's own on int64 copies the sign bit down."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the same bits as a value in [0, 2^64)."""
    return value - (1 << 64) if value >> 63 else value
