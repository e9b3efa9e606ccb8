"""A law fitted to whole steps of one device and one model, as `tandem profile` writes it; and the file that holds it.

The file names the model's sizes: it predicts for that model and no other, because what was measured was its steps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.planning.model_shape import ModelShape
from cluster.planning.step_law import WorkerFacts
from engine.errors import ConfigError
from engine.step_cost import StepWork

FORMAT = "tandem-steps-1"
# Two models that agree in these take the same time, whatever they are called.
SIZES = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "vocab_size")


@dataclass(frozen=True, slots=True)
class Rises:
    """A function of a count that is 0 at 0 and never falls: seconds at each knot, straight lines between them and on
    beyond the last."""

    knots: tuple[int, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class StepTerms:
    """A fitted law's coefficients, in seconds per unit."""

    tokens: Rises
    drawn: Rises
    prompt_step: float
    prompt: float
    pair: float
    prompt_context: float
    decode_row: float
    decode_context: float


def pairs_of(work: StepWork) -> float:
    """Pairs of tokens that attend, over all prompt rows: causal among the new ones."""
    return sum(new * (context + (new + 1) / 2) for new, context in work.prompts)


def drawn_rows(work: StepWork) -> int:
    return work.decode_rows + len(work.prompts)


class MeasuredLaw:
    """Implements StepLaw."""

    def __init__(self, terms: StepTerms) -> None:
        self._terms = terms
        self._tokens_s: dict[int, float] = {}
        self._decode_s: dict[int, float] = {}

    def decode_s(self, rows: int, context_tokens: int) -> float:
        base_s = self._decode_s.get(rows)
        if base_s is None:
            terms = self._terms
            base_s = value_at(terms.tokens, rows) + value_at(terms.drawn, rows) + terms.decode_row * rows
            self._decode_s[rows] = base_s
        return base_s + self._terms.decode_context * context_tokens

    def prompt_s(self, work: StepWork) -> float:
        terms, tokens, prompts = self._terms, work.token_count, work.prompts
        tokens_s = self._tokens_s.get(tokens)
        if tokens_s is None:
            tokens_s = self._tokens_s[tokens] = value_at(terms.tokens, tokens)
        return (
            tokens_s
            + value_at(terms.drawn, drawn_rows(work))
            + terms.prompt_step
            + terms.prompt * len(prompts)
            + terms.pair * pairs_of(work)
            + terms.prompt_context * sum(context for _, context in prompts)
            + terms.decode_row * work.decode_rows
            + terms.decode_context * work.decode_context
        )


def value_at(line: Rises, count: int) -> float:
    """Seconds at `count`; beyond the last knot as steep as before it."""
    knots, seconds = line.knots, line.seconds
    above = 1
    while above < len(knots) - 1 and knots[above] < count:
        above += 1
    low, high = knots[above - 1], knots[above]
    return seconds[above - 1] + (seconds[above] - seconds[above - 1]) * (count - low) / (high - low)


@dataclass(frozen=True, slots=True)
class MeasuredProfile:
    """The file. `device`: what computed, `source`: when and how; `errors`: |predicted − actual| / actual of steps that
    the fit did not see, by kind of step: (median, p90, count)."""

    device: str
    source: str
    facts: WorkerFacts
    terms: StepTerms
    errors: Mapping[str, tuple[float, float, int]]


def is_measured(values: Mapping[str, Any]) -> bool:
    return values.get("format") == FORMAT


def profile_json(profile: MeasuredProfile) -> str:
    return json.dumps({"format": FORMAT, **asdict(profile)}, indent=1) + "\n"


def profile_of(values: Mapping[str, Any], where: str) -> MeasuredProfile:
    """From parsed JSON. Raises ConfigError."""
    try:
        facts = dict(values["facts"])
        for noise in ("prefill_noise", "decode_noise"):
            facts[noise] = tuple(map(float, facts[noise]))
        terms = dict(values["terms"])
        for line in ("tokens", "drawn"):
            terms[line] = _rises(terms[line])
        return MeasuredProfile(
            device=str(values["device"]),
            source=str(values["source"]),
            facts=WorkerFacts(**{**facts, "model": ModelShape(**facts["model"])}),
            terms=StepTerms(**terms),
            errors={kind: tuple(error) for kind, error in values["errors"].items()},
        )
    except (KeyError, TypeError, ValueError) as error:
        message = f"profile {where}: {type(error).__name__}: {error}; `tandem profile` writes a good one"
        raise ConfigError(message) from None


def measured_worker(
    profile: MeasuredProfile, where: str, model: ModelShape | None, tp: int, pp: int, kv_capacity: int | None
) -> tuple[MeasuredLaw, WorkerFacts]:
    """Raises ConfigError when what is asked for is not what was measured."""
    facts = profile.facts
    if (tp, pp) != (facts.tp, facts.pp):
        raise ConfigError(f"profile {where}: was measured with tp {facts.tp}, pp {facts.pp}; got tp {tp}, pp {pp}")
    if model is not None:
        for size in SIZES:
            measured, asked = getattr(facts.model, size), getattr(model, size)
            if measured != asked:
                raise ConfigError(
                    f"profile {where}: was measured with {facts.model.name}, whose {size} is {measured}; "
                    f"{model.name} has {asked}"
                )
    return MeasuredLaw(profile.terms), replace(facts, kv_capacity_tokens=kv_capacity or facts.kv_capacity_tokens)


def _rises(values: Mapping[str, Any]) -> Rises:
    knots, seconds = tuple(map(int, values["knots"])), tuple(map(float, values["seconds"]))
    if len(knots) != len(seconds) or len(knots) < 2 or list(knots) != sorted(set(knots)):
        raise ValueError("knots must rise, one time for each, two at least")
    return Rises(knots, seconds)
