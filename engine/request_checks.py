"""What no worker and no gateway can be asked for, whoever asks. Each check raises InvalidArgument that names the
field."""

from __future__ import annotations

import math
from collections.abc import Sequence

from engine.errors import InvalidArgument
from engine.sampling import SamplingParams

# No model's vocabulary is larger; for workers that compute without a model.
LARGEST_VOCABULARY = 1 << 31


def check_token_ids(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    # At C's speed: a prompt may have 100,000 tokens, and all other requests wait.
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
        token_id = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise InvalidArgument(field, token_id, f"a token id in [0, {vocab_size})")


def check_context(field: str, tokens: int, max_context: int) -> None:
    """Positions beyond the model's context are in none of its tables; and there would be no room for an answer."""
    if tokens >= max_context:
        raise InvalidArgument(
            field, f"{tokens} tokens", f"at most {max_context - 1}: the model's context is {max_context}"
        )


def check_params(params: SamplingParams, vocab_size: int, *, can_guide: bool) -> None:
    """`can_guide`: whether answers can be held to a structure."""
    params.validate(vocab_size)
    if params.structure is not None and not can_guide:
        raise InvalidArgument("sampling_params.structure", params.structure.kind, "none: this worker has no tokenizer")


def check_seconds(**fields: float | None) -> None:
    """None is no time at all, which is right. One that is no number would spoil every order it gets into."""
    for field, seconds in fields.items():
        if seconds is not None and not math.isfinite(seconds):
            raise InvalidArgument(field, seconds, "a number of seconds")
