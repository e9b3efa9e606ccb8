"""What kind of attention a layer does, as one value: every implementation takes it, none is copied for a variant."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class AttentionVariant:
    """A token at position p sees the keys at positions j ≤ p with

        j > p - window      where there is a window,
        or j < sink_tokens  (StreamingLLM, https://arxiv.org/abs/2309.17453),

    with the score s = scale * (q · k), capped to soft_cap * tanh(s / soft_cap) where there is a cap (Gemma 2,
    https://arxiv.org/abs/2408.00118). `sink_logits` [heads] float32 are one more score per head that has no value: it
    joins the softmax's denominator, and the log-sum-exp, alone.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None
    sink_tokens: int = 0
    sink_logits: torch.Tensor | None = None
