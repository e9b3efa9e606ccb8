"""What a chaos run does: a load, and the faults that befall it. Read from YAML, checked like every configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from cluster.yaml_file import parse_mapping, read_text
from engine.errors import ConfigError

POOLS = ("prefill", "decode")


class BaseFault(BaseModel):
    """Once (`at_s`) or again and again (`every_s`). Times are in seconds of the run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str = Field(default="any", description="any, prefill, decode, or a worker's id. Of several, one is drawn.")
    at_s: float | None = Field(default=None, ge=0, allow_inf_nan=False, description="When it happens, once.")
    every_s: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="How often it happens.")

    @model_validator(mode="after")
    def _once_or_often(self) -> Self:
        if (self.at_s is None) == (self.every_s is None):
            raise ValueError("expected either at_s or every_s")
        return self

    def may_hit(self, worker_id: str) -> bool:
        return self.target in ("any", worker_id) or worker_id.startswith(f"{self.target}-")


class Lasting(BaseFault):
    """A fault that ends again."""

    for_s: float = Field(default=10.0, gt=0, allow_inf_nan=False, description="How long it lasts.")


class OfLinks(Lasting):
    """A fault of a worker's links: all of them, or those to `peer`."""

    peer: str = Field(default="any", description="any, gateway, prefill, decode, or a worker's id.")


class Kill(BaseFault):
    """SIGKILL; the worker is started again."""

    kind: Literal["kill"] = "kill"


class Stop(Lasting):
    """SIGSTOP, and SIGCONT after `for_s`."""

    kind: Literal["stop"] = "stop"


class Partition(OfLinks):
    """Nothing gets through by the worker's links, either way; connections stay open, and silent."""

    kind: Literal["partition"] = "partition"


class Slow(OfLinks):
    """The worker's links take longer, either way."""

    kind: Literal["slow"] = "slow"
    delay_ms: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="Added to the way of every byte.")
    bytes_per_s: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Of each connection and direction; null: no limit."
    )

    @model_validator(mode="after")
    def _is_slower(self) -> Self:
        if self.delay_ms == 0 and self.bytes_per_s is None:
            raise ValueError("expected delay_ms, bytes_per_s or both")
        return self


class Corrupt(Lasting):
    """One bit in one of `every_frames` KV frames that the prefill worker sends is flipped, checksums being computed."""

    kind: Literal["corrupt"] = "corrupt"
    every_frames: int = Field(default=1000, ge=1, description="How many frames, on average, have one with a flip.")

    def may_hit(self, worker_id: str) -> bool:
        return worker_id.startswith("prefill-") and super().may_hit(worker_id)


class Clock(Lasting):
    """The clock of the worker's event loop leaps by `jump_s`, and then runs `rate` times as fast for `for_s`."""

    kind: Literal["clock"] = "clock"
    jump_s: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="A loop's clock never goes back.")
    rate: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="1: as before.")

    @model_validator(mode="after")
    def _is_wrong(self) -> Self:
        if self.jump_s == 0 and self.rate == 1:
            raise ValueError("expected jump_s, rate or both")
        return self


Fault: TypeAlias = Kill | Stop | Partition | Slow | Corrupt | Clock
KINDS: dict[str, type[BaseFault]] = {
    kind.model_fields["kind"].default: kind for kind in (Kill, Stop, Partition, Slow, Corrupt, Clock)
}


class ChaosPlan(BaseModel):
    """The load: so many streams, each asks one prompt after the other, greedily. And the faults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float = Field(default=60.0, gt=0, allow_inf_nan=False, description="How long faults happen.")
    streams: int = Field(default=8, ge=1, le=1024, description="Requests that run at any time.")
    prompts: int = Field(default=16, ge=1, le=4096, description="Different prompts.")
    prompt_tokens: int = Field(default=128, ge=1, description="About how long each is.")
    answer_tokens: int = Field(default=64, ge=2, description="How long each answer is.")
    seed: int = Field(default=0, description="Decides prompts, targets and times.")
    faults: tuple[Annotated[Fault, Field(discriminator="kind")], ...] = Field(
        default=(Kill(every_s=5.0),), description="What happens."
    )

    def has(self, *kinds: type[BaseFault]) -> bool:
        """Whether there is a fault of one of these kinds."""
        return any(isinstance(fault, kinds) for fault in self.faults)


def read_plan(path: Path | None, worker_ids: Sequence[str]) -> ChaosPlan:
    """The plan in a YAML file; the default without one. `worker_ids`: who there is to be hit. Raises ConfigError that
    names the field."""
    if path is None:
        return ChaosPlan()
    expected = f"a mapping with the keys {', '.join(ChaosPlan.model_fields)}"
    values = parse_mapping(read_text(path), str(path), expected)
    try:
        plan = ChaosPlan.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_describe(error.errors()[0])}") from None
    for index, fault in enumerate(plan.faults):
        problem = _nonsense(fault, plan.seconds, worker_ids)
        if problem:
            raise ConfigError(f"{path}: faults.{index}.{problem}")
    return plan


def _nonsense(fault: Fault, seconds: float, worker_ids: Sequence[str]) -> str:
    """What is wrong with a fault in this run; "" if nothing is."""
    for name, when_s in (("at_s", fault.at_s), ("every_s", fault.every_s)):
        if when_s is not None and when_s >= seconds:
            return f"{name}: got {when_s:g}, expected less than seconds, which is {seconds:g}"
    if not any(fault.may_hit(worker_id) for worker_id in worker_ids):
        sends = [name for name in worker_ids if name.startswith("prefill-")]
        who = sends if isinstance(fault, Corrupt) else [*POOLS, *worker_ids]
        return f"target: got {fault.target!r}, expected one of {', '.join(['any', *who])}"
    if not isinstance(fault, OfLinks) or fault.peer in ("any", "gateway"):
        return ""
    pool, _, _ = fault.target.partition("-")
    peers = [name for name in [*POOLS, *worker_ids] if pool not in POOLS or not name.startswith(pool)]
    if fault.peer not in peers:
        # Workers of one pool never speak to each other.
        return f"peer: got {fault.peer!r}, expected one of {', '.join(['any', 'gateway', *peers])}"
    return ""


def _describe(problem: ErrorDetails) -> str:
    place, known = list(problem["loc"]), set(ChaosPlan.model_fields)
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        tag = problem.get("ctx", {}).get("tag")
        got = "" if tag is None else f"got {tag!r}, "
        return f"{_dotted(place)}.kind: {got}expected one of {', '.join(KINDS)}"
    if len(place) > 2:
        # The kind, which pydantic puts among the keys.
        known = set(KINDS[str(place.pop(2))].model_fields)
    if problem["type"] == "extra_forbidden":
        near = get_close_matches(str(place[-1]), sorted(known), 1)
        names = f"nearest known key: {near[0]}" if near else f"known: {', '.join(sorted(known))}"
        return f"{_dotted(place)}: unknown key, {names}"
    message = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, expected ")
    message = {"model_attributes_type": "a mapping", "tuple_type": "a list"}.get(problem["type"], message)
    got = "" if isinstance(problem["input"], Mapping) else f"got {problem['input']!r}, "
    return f"{_dotted(place)}: {got}expected: {message}"


def _dotted(place: Sequence[object]) -> str:
    return ".".join(str(part) for part in place)
