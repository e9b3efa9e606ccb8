"""From measured steps to a profile: fits the law, and judges it by steps that it did not see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.planning.measured_law import MeasuredLaw, MeasuredProfile
from cluster.planning.step_fit import Measured, fit
from cluster.planning.step_law import WorkerFacts
from engine.errors import ConfigError
from engine.step_cost import StepWork

# Kinds of steps that are judged apart.
KINDS = ("decode", "prompt", "mixed")
# Noise is kept as so many quantiles of actual / predicted.
NOISE_QUANTILES = 40
# Fewer steps than this do not say what a law's coefficients are.
LEAST_STEPS = 12

Error = tuple[float, float, int]


@dataclass(frozen=True, slots=True)
class Judged:
    """A step that the fit did not see. `error`: predicted / actual − 1."""

    work: StepWork
    actual_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        return self.predicted_s / self.actual_s - 1.0


def kind_of(work: StepWork) -> str:
    if not work.prompts:
        return "decode"
    return "mixed" if work.decode_rows else "prompt"


def predicted_s(law: MeasuredLaw, work: StepWork) -> float:
    return law.prompt_s(work) if work.prompts else law.decode_s(work.decode_rows, work.decode_context)


def make_profile(
    facts: WorkerFacts, device: str, source: str, anchors: Sequence[Measured], held_out: Sequence[Measured]
) -> tuple[MeasuredProfile, list[Judged]]:
    """The profile, and what it was judged by: the law of `anchors` alone. The profile's own law is then fitted to all.

    Raises ConfigError when there are too few steps to fit.
    """
    if len(anchors) < LEAST_STEPS:
        raise ConfigError(f"profile: {len(anchors)} steps could be measured, expected {LEAST_STEPS}: give it more time")
    law = MeasuredLaw(fit(anchors))
    judged = [Judged(step.work, step.seconds, predicted_s(law, step.work)) for step in held_out]
    terms = fit([*anchors, *held_out])
    with_noise = replace(
        facts,
        prefill_noise=_noise(law, [step for step in held_out if step.work.prompts]),
        decode_noise=_noise(law, [step for step in held_out if not step.work.prompts]),
    )
    return MeasuredProfile(device, source, with_noise, terms, errors_of(judged)), judged


def errors_of(judged: Sequence[Judged]) -> Mapping[str, Error]:
    """By kind of step, and of all: median and 90th percentile of |predicted − actual| / actual, and how many."""
    kinds = {kind: [abs(step.error) for step in judged if kind_of(step.work) == kind] for kind in KINDS}
    kinds["all"] = [abs(step.error) for step in judged]
    return {
        kind: (quantile(errors, 0.5), quantile(errors, 0.9), len(errors)) for kind, errors in kinds.items() if errors
    }


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))]


def _noise(law: MeasuredLaw, steps: Sequence[Measured]) -> tuple[float, ...]:
    """Quantiles of actual / predicted over every single time that the steps were run, in the middle of equal shares."""
    ratios = [seconds / predicted_s(law, step.work) for step in steps for seconds in step.samples]
    if len(ratios) < NOISE_QUANTILES:
        return ()
    shares = ((number + 0.5) / NOISE_QUANTILES for number in range(NOISE_QUANTILES))
    return tuple(round(quantile(ratios, share), 4) for share in shares)
