"""DistServe's published step-time fits as one more source of times: OPT on A100-80G, its own engine or its vLLM.

    prefill   a + b · Σ tokens + c · Σ tokens²        ms
    decode    a + b · Σ context + c · batch           ms, one fit below a batch size and one from it on

The form is DistServe's (Zhong et al., OSDI 2024, appendix A), the files its simulator's. That simulator divides a time
by the pipeline stages, because it runs a batch in each of them; the stages of one batch together take the whole time,
which is what a worker with one batch under way needs. So pp changes the memory here, and not the step.
The fits know neither cached context nor mixed steps: a chunk costs what it adds to Σ tokens², and decode rows in a
prompt's step add their own terms to one fixed part, the larger of the two.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.planning.capacity import kv_capacity_tokens
from cluster.planning.model_shape import ModelShape
from engine.errors import ConfigError
from engine.step_cost import StepWork

CAPACITY_FILE = "max_num_tokens.csv"
MS = 1e-3
# The devices of the fits, for models that the capacity file does not list.
A100_BYTES = 80 * 10**9


@dataclass(frozen=True, slots=True)
class Line:
    """Coefficients a, b, c in milliseconds."""

    a: float
    b: float
    c: float


@dataclass(frozen=True, slots=True)
class DistServeLaw:
    """Implements StepLaw for one model and tensor-parallel degree. `large_batch`: the first that `large` is for."""

    prefill: Line
    small: Line
    large: Line
    large_batch: int

    def decode_s(self, rows: int, context_tokens: int) -> float:
        line = self.small if rows < self.large_batch else self.large
        return MS * (line.a + line.b * context_tokens + line.c * rows)

    def prompt_s(self, work: StepWork) -> float:
        line = self.prefill
        squares = sum(new * (new + 2 * context) for new, context in work.prompts)
        # One of vLLM's fits bends downwards, but turns only far beyond OPT's context.
        added = max(0.0, line.b * work.prompt_tokens + line.c * squares)
        if not work.decode_rows:
            return MS * (line.a + added)
        decode = self.decode_s(work.decode_rows, work.decode_context) / MS
        fixed = (self.small if work.decode_rows < self.large_batch else self.large).a
        return MS * (max(line.a, fixed) + added + decode - fixed)


def is_distserve(values: Mapping[str, Any]) -> bool:
    """Whether a parsed JSON file has this form."""
    return bool(values) and all(
        isinstance(by_tp, dict) and all(isinstance(fit, dict) and "prefill" in fit for fit in by_tp.values())
        for by_tp in values.values()
    )


def distserve_law(values: Mapping[str, Any], where: str, model: ModelShape, tp: int) -> DistServeLaw:
    """The fits of `model` on `tp` devices. Raises ConfigError naming what the file has."""
    by_tp = values.get(published_name(model))
    if by_tp is None:
        raise ConfigError(f"{where}: has no fit of {model.name}; known: {', '.join(map(_short_name, values))}")
    fit = by_tp.get(str(tp))
    if fit is None:
        raise ConfigError(f"{where}: has no fit of {model.name} with tp {tp}; known: tp {', '.join(by_tp)}")
    try:
        prefill, small, large = (
            Line(*map(float, fit[key])) for key in ("prefill", "decoding_smallbs", "decoding_largebs")
        )
        return DistServeLaw(prefill, small, large, int(fit["decoding_large_small_bs_threshold"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: the fit of {model.name} with tp {tp} cannot be read: {error!r}") from None


def distserve_capacity(path: Path, model: ModelShape, tp: int, pp: int) -> int:
    """KV capacity in tokens from the file beside the fits; by arithmetic where it has no such row."""
    table = path.parent / CAPACITY_FILE
    if table.is_file():
        with table.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if (row["model"], row["tp"], row["pp"]) == (published_name(model), str(tp), str(pp)):
                    return int(row["max_num_tokens"])
    return kv_capacity_tokens(model, A100_BYTES, tp, pp)


def read_profile(path: Path) -> dict[str, Any]:
    """The JSON object in a profile file. Raises ConfigError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"profile {path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"profile {path}: got a {type(values).__name__}, expected a JSON object")
    return values


def published_name(model: ModelShape) -> str:
    """How the files name a model: facebook/opt-13b for opt-13b."""
    return model.name if "/" in model.name else f"facebook/{model.name}"


def _short_name(name: str) -> str:
    return name.removeprefix("facebook/")
