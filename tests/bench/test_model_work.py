"""Bytes and operations of a model, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.model_configs import LLAMA_31_8B, TINY
from bench.model_work import work_of

# One layer: q, o 64 x 64; k, v 32 x 64; gate, up, down 128 x 64.
TINY_LAYER = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64
NORMS = 5 * 64


def test_of_the_tiny_model() -> None:
    work = work_of(TINY, 4, "dense")
    assert work.weight_bytes == 4 * (2 * TINY_LAYER + 512 * 64 + NORMS)
    assert work.kv_token_bytes == 2 * 2 * 2 * 16 * 4
    assert work.token_flops == 2 * 2 * TINY_LAYER
    assert work.pair_flops == 4 * 2 * 4 * 16
    assert work.decode_bytes(3, 10) == work.weight_bytes + 30 * work.kv_token_bytes
    # Three tokens see 1 + 2 + 3.
    assert work.prefill_flops(3) == 3 * work.token_flops + 6 * work.pair_flops


def test_a_tied_head_is_read_like_any_other() -> None:
    assert work_of(replace(TINY, tie_embeddings=True), 4, "dense") == work_of(TINY, 4, "dense")


@pytest.mark.parametrize(("weight_format", "bits"), [("int8", 8.5), ("int4", 5.0)])
def test_integers_bring_their_scales(weight_format: str, bits: float) -> None:
    work = work_of(TINY, 2, weight_format)
    assert work.weight_bytes == bits / 8 * (2 * TINY_LAYER + 512 * 64) + 2 * NORMS
    assert work.token_flops == work_of(TINY, 2, "dense").token_flops


def test_of_llama() -> None:
    """8,030,261,248 parameters, of which a step does not read the 128,256 x 4,096 of the embedding."""
    work = work_of(LLAMA_31_8B, 2, "dense")
    assert work.weight_bytes == 2 * (8_030_261_248 - 128_256 * 4_096)
    assert work.kv_token_bytes == 128 << 10
