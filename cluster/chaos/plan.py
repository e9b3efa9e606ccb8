"""What a chaos run does: a load, and the faults that befall it. Read from YAML, checked like every configuration."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from cluster.yaml_file import parse_mapping, read_text
from engine.errors import ConfigError


class Fault(BaseModel):
    """One kind of fault, once (`at_s`) or again and again (`every_s`). Times are in seconds of the run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["kill", "stop"] = Field(
        description="kill: SIGKILL; the worker is started again. stop: SIGSTOP, and SIGCONT after `for_s`."
    )
    target: str = Field(default="any", description="any, prefill, decode, or a worker's id. Of several, one is drawn.")
    at_s: float | None = Field(default=None, ge=0, allow_inf_nan=False, description="When it happens, once.")
    every_s: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="How often it happens.")
    for_s: float = Field(default=10.0, gt=0, allow_inf_nan=False, description="How long a stopped worker stays so.")

    @model_validator(mode="after")
    def _once_or_often(self) -> Self:
        if (self.at_s is None) == (self.every_s is None):
            raise ValueError("expected either at_s or every_s")
        return self


class ChaosPlan(BaseModel):
    """The load: so many streams, each asks one prompt after the other, greedily. And the faults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float = Field(default=60.0, gt=0, allow_inf_nan=False, description="How long faults happen.")
    streams: int = Field(default=8, ge=1, le=1024, description="Requests that run at any time.")
    prompts: int = Field(default=16, ge=1, le=4096, description="Different prompts.")
    prompt_tokens: int = Field(default=128, ge=1, description="About how long each is.")
    answer_tokens: int = Field(default=64, ge=2, description="How long each answer is.")
    seed: int = Field(default=0, description="Decides prompts, targets and times.")
    faults: tuple[Fault, ...] = Field(default=(Fault(kind="kill", every_s=5.0),), description="What happens.")


def read_plan(path: Path | None) -> ChaosPlan:
    """The plan in a YAML file; the default without one. Raises ConfigError."""
    if path is None:
        return ChaosPlan()
    expected = f"a mapping with the keys {', '.join(ChaosPlan.model_fields)}"
    values = parse_mapping(read_text(path), str(path), expected)
    try:
        return ChaosPlan.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_describe(error.errors()[0])}") from None


def _describe(problem: ErrorDetails) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = Fault.model_fields if len(problem["loc"]) > 1 else ChaosPlan.model_fields
        near = get_close_matches(str(problem["loc"][-1]), known, 1)
        return f"{where}: unknown key, " + (f"nearest known key: {near[0]}" if near else f"known: {', '.join(known)}")
    message = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, expected ")
    got = "" if isinstance(problem["input"], Mapping) else f"got {problem['input']!r}, "
    return f"{where}: {got}expected: {message}"
