"""Sampling parameters: one frozen value, checked once, passed down unchanged.

Names and defaults follow the field's usage (vLLM, SGLang, OpenAI).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from engine.errors import InvalidArgument
from engine.structure import Structure

MAX_CHOICES = 64
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGIT_BIAS = 1024


@dataclass(frozen=True, slots=True)
class Range:
    """From `low`, itself included unless `is_open`, to `high`, included."""

    low: float
    high: float
    is_open: bool = False


NUMBERS: Mapping[str, Range] = MappingProxyType(
    {
        "temperature": Range(0.0, 100.0),
        "top_p": Range(0.0, 1.0, is_open=True),
        "min_p": Range(0.0, 1.0),
        "repetition_penalty": Range(0.0, 100.0, is_open=True),
        "presence_penalty": Range(-2.0, 2.0),
        "frequency_penalty": Range(-2.0, 2.0),
    }
)
COUNTS: Mapping[str, Range] = MappingProxyType(
    {
        "top_k": Range(-1, 1 << 31),
        "n": Range(1, MAX_CHOICES),
        "max_tokens": Range(1, 1 << 31),
        "min_tokens": Range(0, 1 << 31),
        "logprobs": Range(0, MAX_LOGPROBS),
        "seed": Range(-(1 << 63), (1 << 63) - 1),
    }
)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw the tokens of one request.

    `temperature` 0 means greedy. `top_k` 0 or -1 means no limit. `seed` None means that the gateway picks one.
    Choice `i` of `n` draws its token `t` from a number that depends on (seed, i, t) alone.
    `logprobs` None means none, 0 the sampled token's alone, k the k most likely besides.
    `structure`: what the answer is held to; None: to nothing.
    """

    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    n: int = 1
    max_tokens: int = 128
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = field(default=None)
    structure: Structure | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def needs_history(self) -> bool:
        """True where the draw depends on the tokens before it (penalties, structure)."""
        has_penalty = self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
        return has_penalty or self.structure is not None

    def validate(self, vocab_size: int) -> None:
        """Raises InvalidArgument naming the first field that is out of range."""
        self._check_numbers()
        self._check_counts()
        if self.structure is not None:
            self.structure.validate()
            # Its end is the answer's, neither earlier nor later.
            if self.ignore_eos:
                raise InvalidArgument("sampling_params.ignore_eos", True, "false with a structure")
            if self.min_tokens:
                raise InvalidArgument("sampling_params.min_tokens", self.min_tokens, "0 with a structure")
        for name, token_ids in (
            ("stop_token_ids", self.stop_token_ids),
            ("logit_bias", tuple(token_id for token_id, _ in self.logit_bias)),
        ):
            for token_id in token_ids:
                if not 0 <= token_id < vocab_size:
                    raise InvalidArgument(f"sampling_params.{name}", token_id, f"a token id in [0, {vocab_size})")

    def _check_numbers(self) -> None:
        for name, allowed in NUMBERS.items():
            value = getattr(self, name)
            inside = allowed.low <= value <= allowed.high and not (allowed.is_open and value == allowed.low)
            if not math.isfinite(value) or not inside:
                bracket = "(" if allowed.is_open else "["
                limits = f"a number in {bracket}{allowed.low:g}, {allowed.high:g}]"
                raise InvalidArgument(f"sampling_params.{name}", value, limits)
        for token_id, bias in self.logit_bias:
            if not math.isfinite(bias) or abs(bias) > 100:
                raise InvalidArgument("sampling_params.logit_bias", {token_id: bias}, "a bias in [-100, 100]")

    def _check_counts(self) -> None:
        for name, allowed in COUNTS.items():
            value = getattr(self, name) or 0
            high = self.max_tokens if name == "min_tokens" else allowed.high
            if not allowed.low <= value <= high:
                raise InvalidArgument(f"sampling_params.{name}", value, f"an integer in [{allowed.low}, {high}]")
        if len(self.stop) > MAX_STOPS:
            raise InvalidArgument("sampling_params.stop", len(self.stop), f"at most {MAX_STOPS} stop strings")
        for text in self.stop:
            if not 0 < len(text) <= MAX_STOP_CHARS:
                raise InvalidArgument("sampling_params.stop", text, f"strings of 1 to {MAX_STOP_CHARS} characters")
        if len(self.stop_token_ids) > MAX_STOPS:
            raise InvalidArgument("sampling_params.stop_token_ids", len(self.stop_token_ids), f"at most {MAX_STOPS}")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidArgument(
                "sampling_params.logit_bias", len(self.logit_bias), f"at most {MAX_LOGIT_BIAS} entries"
            )
