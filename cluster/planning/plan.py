"""What a plan is asked for, and what it answers: plain values, no search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cluster.planning.arrangement import Arrangement, Kind
from cluster.planning.placement import Affinity, Goal
from engine.errors import ConfigError
from engine.objectives import Objectives

Phase = Literal["prefill", "decode", "both"]

# Two arrangements this close carry the same: the emulator's searches are no finer.
TIE = 0.03


# Shapes that can be planned and emulated, but not served: the engine has no such architecture.
UNSERVED = ("opt-13b", "opt-66b")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSpec:
    """A cluster to be bought or split: `gpus` of one `profile` in nodes of `gpus_per_node`, for one model.

    `affinity` None: low where KV between nodes would take a noticeable part of the time to the first token. `target`:
    share of requests that must keep both objectives. `allow_local`: decode workers of a disaggregated arrangement may
    compute prompts too, where the router finds that better, as `tandem serve` does. `colocated_profile`: times of
    another engine for the colocated workers, where they are not the same. `max_tp`: the most tensor ranks (a node's
    GPUs by default). `chunks`: sizes of a colocated worker's prompt chunks that are tried, None for whole prompts; ()
    for those that suggest themselves. `keep`: arrangements of each kind that are judged whole. `requests`: of the
    trace, in one emulation of a single worker; whole arrangements get as many for each of their workers, as far as the
    trace goes. `span_answers`: a run lasts so many mean answers, so that decode batches are as full as they get.
    `processes`: emulations side by side; they change nothing but the time. `time_budget_s`: after it, no
    further arrangement is judged.
    """

    profile: str
    model: str
    gpus: int
    gpus_per_node: int
    objectives: Objectives
    affinity: Affinity | None = None
    goal: Goal = "cluster"
    target: float = 0.9
    seed: int = 0
    router: str = "goodput"
    allow_local: bool = True
    colocated_profile: str | None = None
    max_tp: int | None = None
    chunks: tuple[int | None, ...] = ()
    keep: int = 3
    requests: int = 300
    span_answers: float = 4.0
    processes: int = 1
    time_budget_s: float | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError naming the field."""
        for name in ("gpus", "gpus_per_node", "keep", "requests", "processes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected 1 or more")
        if not 0 < self.target < 1:
            raise ConfigError(f"target: got {self.target}, expected a share between 0 and 1")
        for name in ("ttft_s", "tpot_s"):
            value = getattr(self.objectives, name)
            if value is None or not value > 0:
                raise ConfigError(f"objectives.{name}: got {value}, expected a positive time")


@dataclass(frozen=True, slots=True)
class Question:
    """One search of the emulator: the goodput of an arrangement, or of one phase of it with the other for free.
    `expected_rps`: where to begin. `link_bytes_s`: what a GPU can send of KV."""

    arrangement: Arrangement
    phase: Phase
    expected_rps: float
    link_bytes_s: float

    @property
    def label(self) -> str:
        """What is asked about, in words: an arrangement, or one phase's worker alone."""
        pool = self.arrangement.prefill if self.phase == "prefill" else self.arrangement.decode
        if self.phase == "both" or pool is None:
            return self.arrangement.label
        return f"{self.phase} worker, {pool.parallel}"


@dataclass(frozen=True, slots=True)
class Judgement:
    """`goodput_rps`: of all GPUs of the arrangement. Percentiles over the requests at that rate, in seconds; None where
    no rate was good enough. `note`: what a reader should know of it."""

    goodput_rps: float
    attainment: float = 0.0
    ttft_p90_s: float | None = None
    tpot_p90_s: float | None = None
    tpot_p50_s: float | None = None
    note: str = ""


# Answers questions, in their order.
Judge = Callable[[Sequence[Question]], Sequence[Judgement]]


@dataclass(frozen=True, slots=True)
class Arm:
    """One arrangement, judged. `bound_rps`: what no scheduler would exceed (cluster/planning/bounds.py);
    `estimate_rps`: what its workers carry alone, added up."""

    arrangement: Arrangement
    judgement: Judgement
    estimate_rps: float
    bound_rps: float

    @property
    def goodput_rps(self) -> float:
        return self.judgement.goodput_rps

    @property
    def rps_per_gpu(self) -> float:
        """Over the GPUs that it uses."""
        return self.judgement.goodput_rps / self.arrangement.gpus


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was not judged, and why, in words."""

    label: str
    reason: str


@dataclass(frozen=True, slots=True)
class PhaseArm:
    """One worker of one phase, judged alone. `rps`: of that worker."""

    phase: Phase
    label: str
    gpus: int
    rps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The answer. `arms` best first; `chosen` is None when nothing keeps the objectives."""

    spec: PlanSpec
    affinity: Affinity
    chosen: Arm | None
    arms: tuple[Arm, ...]
    phases: tuple[PhaseArm, ...]
    pruned: tuple[Pruned, ...]
    trace_requests: int
    trace_rps: float | None
    mean_prompt_tokens: float
    mean_output_tokens: float
    transfer_s: float
    notes: tuple[str, ...] = field(default=())

    def best(self, kind: Kind) -> Arm | None:
        """The best judged arm of one kind."""
        return next((arm for arm in self.arms if arm.arrangement.kind == kind), None)

    @property
    def answer(self) -> str:
        """One or two sentences: whether to disaggregate, and the numbers that say so."""
        if self.chosen is None:
            ttft_ms, tpot_ms = (self.spec.objectives.ttft_s or 0) * 1e3, (self.spec.objectives.tpot_s or 0) * 1e3
            wanted = f"TTFT {ttft_ms:g} ms and TPOT {tpot_ms:g} ms for {self.spec.target:.0%}"
            return f"No arrangement keeps {wanted} at any rate."
        pair, single = self.best("disaggregated"), self.best("colocated")
        if pair is None or pair.goodput_rps == 0:
            return f"Do not disaggregate: {_carries(self.chosen)}; no disaggregated arrangement keeps the objectives."
        if single is None or single.goodput_rps == 0:
            return f"Disaggregate: {_carries(self.chosen)}; no colocated arrangement keeps the objectives."
        if self.spec.goal == "cluster":
            ratio = pair.goodput_rps / single.goodput_rps
        else:
            ratio = pair.rps_per_gpu / single.rps_per_gpu
        if abs(ratio - 1) <= TIE:
            verdict = "It makes no difference"
        else:
            verdict = "Disaggregate" if ratio > 1 else "Do not disaggregate"
        numbers = f"{_carries(pair)}; colocated, {_carries(single)}"
        return f"{verdict}: {numbers}. Disaggregation gives {ratio:.2f} times as much."


def _carries(arm: Arm) -> str:
    return f"{arm.arrangement.label} carries {arm.goodput_rps:.3g} req/s ({arm.rps_per_gpu:.3g} per GPU)"
