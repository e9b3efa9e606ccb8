"""What every decision asks: how long a step of one worker takes, what its memory holds, what a transfer costs.

    profile ─▶ StepLaw: seconds by the profile ─┐
    model   ─▶ sizes, KV bytes, capacity        ├─ CostModel ─▶ schedulers, router, emulator, planner
    steps that were really run ─▶ Refit: scales ┘

Pipeline stages run one after another for one batch, as the engine does: pp > 1 buys memory, not speed.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from cluster.planning.capacity import check_split, kv_capacity_tokens
from cluster.planning.device_profile import device_profile, known_profiles
from cluster.planning.distserve_profile import distserve_capacity, distserve_law, is_distserve, read_profile
from cluster.planning.measured_law import is_measured, measured_worker, profile_of
from cluster.planning.model_shape import ModelShape, model_shape, shape_of_model
from cluster.planning.operator_law import OperatorLaw
from cluster.planning.refit import CostError, Refit
from cluster.planning.step_law import StepLaw, WorkerFacts
from engine.errors import ConfigError
from engine.model_config import ModelConfig
from engine.step_cost import StepWork

# A chunk is large enough when its tokens come at this part of the best rate.
SATURATED_RATE = 0.95
# Chunks that are looked at for it: eight per octave, up to 8,192 tokens.
CHUNKS = tuple(sorted({round(2 ** (eighth / 8)) for eighth in range(13 * 8 + 1)}))
# Words of torch's device names, and the packaged profile for each. Other GPUs begin as the slowest of the large ones.
BY_DEVICE_NAME = {"cpu": "cpu", "h200": "h200", "h100": "h100", "a100": "a100-80g", "l40s": "l40s", "l4": "l4"}
OTHER_GPU = "a100-80g"


class CostModel:
    """Implements engine.step_cost.StepCost. Copies made by `with_scales` share what is memoised."""

    def __init__(self, law: StepLaw, facts: WorkerFacts, prefill_scale: float = 1.0, decode_scale: float = 1.0) -> None:
        self.law, self.facts = law, facts
        self._refit = Refit(prefill_scale, decode_scale)
        self._kv_token_bytes = facts.model.kv_token_bytes(facts.element_bytes)

    # ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def step_s(self, work: StepWork) -> float:
        """Seconds of one forward pass, drawing included, as corrected by what was observed; 0.0 for no work."""
        rows = work.decode_rows
        decode_s = self.law.decode_s(rows, work.decode_context) if rows else 0.0
        if not work.prompts:
            return self._refit.decode * decode_s
        return self._refit.predicted_s(decode_s, max(0.0, self.law.prompt_s(work) - decode_s))

    def prefill_s(self, new_tokens: int, context: int = 0, chunk_tokens: int | None = None) -> float:
        """Seconds of a prompt alone: `new_tokens` after `context` cached ones, in steps of `chunk_tokens` (all in one
        by default)."""
        size = chunk_tokens or max(new_tokens, 1)
        chunks = ((min(size, new_tokens - start), context + start) for start in range(0, new_tokens, size))
        return sum(self.step_s(StepWork((chunk,))) for chunk in chunks)

    def decode_s(self, rows: int, context_tokens: int) -> float:
        """Seconds of one step of `rows` decode rows that read `context_tokens` of KV together."""
        return self._refit.decode * self.law.decode_s(rows, context_tokens) if rows else 0.0

    def loop_s(self, rows: int) -> float:
        """Seconds that a worker's own loop takes per step outside the forward pass, for a batch of so many rows. Part
        of no other answer; 0.0 where it was not measured."""
        return self.facts.loop_step_s + self.facts.loop_row_s * rows

    @cached_property
    def saturation_tokens(self) -> int:
        """DistServe's L_m: the smallest chunk of a fresh prompt whose tokens come at 95 % of the best rate or more."""
        rates = [tokens / self.law.prompt_s(StepWork(((tokens, 0),))) for tokens in CHUNKS]
        good = SATURATED_RATE * max(rates)
        return next(tokens for tokens, rate in zip(CHUNKS, rates, strict=True) if rate >= good)

    # ── memory and links ─────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def gpus(self) -> int:
        return self.facts.tp * self.facts.pp

    @property
    def kv_capacity_tokens(self) -> int:
        return self.facts.kv_capacity_tokens

    def kv_bytes(self, tokens: int) -> int:
        return tokens * self._kv_token_bytes

    def transfer_s(self, tokens: int, bytes_per_s: float) -> float:
        """Seconds of `tokens`' KV over a link of so many bytes a second."""
        return tokens * self._kv_token_bytes / bytes_per_s

    # ── learning ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def observe(self, work: StepWork, seconds: float) -> None:
        """Takes a step that was really run: its error first, then what it teaches."""
        rows = work.decode_rows
        decode_s = self.law.decode_s(rows, work.decode_context) if rows else 0.0
        rest_s = max(0.0, self.law.prompt_s(work) - decode_s) if work.prompts else 0.0
        self._refit.learn(decode_s, rest_s, seconds)

    def error(self) -> CostError:
        """Of the predictions of the last steps, each judged before it was learned from."""
        return self._refit.error()

    @property
    def scales(self) -> tuple[float, float]:
        """(prefill, decode): how many times longer than its profile says this worker takes."""
        return self._refit.prefill, self._refit.decode

    @property
    def prefill_noise(self) -> tuple[float, ...]:
        """Measured ratios of actual to predicted seconds of steps with prompts; () where nobody measured."""
        return self.facts.prefill_noise

    @property
    def decode_noise(self) -> tuple[float, ...]:
        return self.facts.decode_noise

    @property
    def link_bytes_s(self) -> float | None:
        """What one device of the worker sends a second, by the profile; None where it does not say."""
        return self.facts.link_bytes_s

    def with_scales(self, prefill: float, decode: float) -> CostModel:
        """The same worker, corrected by what another copy has learned. What is no positive number counts as 1: a worker
        that says nothing reports 0."""
        given = [scale if 0 < scale < math.inf else 1.0 for scale in (prefill, decode)]
        return CostModel(self.law, self.facts, *given)


def cost_model(profile: str, model: str, tp: int = 1, pp: int = 1, *, kv_capacity: int | None = None) -> CostModel:
    """The cost model of one worker of tp · pp devices.

    `profile`: a packaged device's name, or the path of a device file, of what `tandem profile` wrote, or of DistServe's
    fits. `model`: a built-in shape's name or a config.json; "" with a measured profile: the model it was measured with.
    `kv_capacity`: tokens of KV, where that is not what the device's memory leaves room for.
    Raises ConfigError: unknown names, a split that the model does not allow, weights that do not fit.
    """
    shape = model_shape(model) if model else None
    if shape is not None:
        check_split(shape, tp, pp)
    return _worker(profile, shape, tp, pp, kv_capacity)


def predictor_for_worker(
    profile: str,
    device_name: str,
    model: ModelConfig,
    *,
    tp: int = 1,
    pp: int = 1,
    kv_capacity: int,
    element_bytes: int,
) -> CostModel:
    """The cost model that a running worker starts from, and then corrects by its own steps.

    `profile`: as in `cost_model`, or "": the packaged one nearest to `device_name`, which is torch's name of the GPU,
    or "cpu". `kv_capacity` and `element_bytes` (of a KV element) are the engine's own. Raises ConfigError as
    `cost_model`, but for uneven splits: the engine has them.
    """
    shape = shape_of_model(model)
    found = _worker(profile or nearest_profile(device_name), shape, tp, pp, kv_capacity)
    return CostModel(found.law, replace(found.facts, element_bytes=element_bytes))


def nearest_profile(device_name: str) -> str:
    """The packaged profile for a device by torch's name of it, "NVIDIA H100 80GB HBM3"."""
    words = device_name.lower().replace("-", " ").split()
    return next((profile for word, profile in BY_DEVICE_NAME.items() if word in words), OTHER_GPU)


def _worker(profile: str, model: ModelShape | None, tp: int, pp: int, kv_capacity: int | None) -> CostModel:
    path = Path(profile)
    if profile not in known_profiles():
        if not path.is_file():
            known = ", ".join(known_profiles())
            raise ConfigError(f"profile {profile!r} is no packaged device and no file; known devices: {known}")
        values = read_profile(path)
        if is_measured(values):
            return CostModel(*measured_worker(profile_of(values, profile), profile, model, tp, pp, kv_capacity))
        if model is not None and is_distserve(values):
            law = distserve_law(values, profile, model, tp)
            capacity = kv_capacity or distserve_capacity(path, model, tp, pp)
            return CostModel(law, WorkerFacts(model, capacity, tp=tp, pp=pp))
    if model is None:
        raise ConfigError(f"model: got '', expected a name or a config.json: profile {profile} is not of one model")
    device = device_profile(profile)
    capacity = kv_capacity or kv_capacity_tokens(model, device.memory_bytes, tp, pp, device.element_bytes)
    if not capacity:
        gb = device.memory_bytes / 1e9
        raise ConfigError(f"{model.name} does not fit on {tp} x {pp} {device.name} of {gb:.0f} GB: raise tp or pp")
    facts = WorkerFacts(model, capacity, device.element_bytes, tp, pp, link_bytes_s=device.network_bytes_s)
    return CostModel(OperatorLaw(device, model, tp, pp), facts)
