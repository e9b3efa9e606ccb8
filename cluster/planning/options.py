"""The flags of `tandem emulate` and `tandem plan`, each as one value.

Apart from the commands: the command line reads these at its start, and must not load what the commands need.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulateOptions:
    """The command's flags, under their names. Times of the objectives in milliseconds."""

    trace: Path
    profile: str
    model: str
    prefill: int = 0
    decode: int = 0
    ttft_ms: float
    tpot_ms: float
    limit: int | None = None
    colocated: int = 0
    tp_prefill: int = 1
    tp_decode: int = 1
    router: str = "goodput"
    rate_scale: float = 1.0
    find_goodput: bool = False
    seed: int = 0
    spread: bool = False
    arrivals: str | None = None
    rate: float | None = None
    cv: float = 1.0
    controller: bool = False
    processes: int = 1
    as_json: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """The command's flags, under their names. Times of the objectives in milliseconds.

    `out`: the configuration's path; the table (.md), all numbers (.json) and the picture (.png) go beside it.
    """

    profile: str
    model: str
    gpus: int
    gpus_per_node: int
    trace: Path
    ttft_ms: float
    tpot_ms: float
    affinity: str | None = None
    out: Path | None = None
    limit: int | None = None
    spread: bool = False
    seed: int = 0
    router: str = "goodput"
    requests: int = 300
    keep: int = 3
    processes: int = 0
    time_budget_s: float | None = None
    as_json: bool = False
