"""`tandem plan`: which arrangement of so many GPUs carries most requests like a trace's within their objectives."""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast, get_args

from rich.console import Console

from cluster.gateway_config import require_policy
from cluster.planning.arrangement import Parallel
from cluster.planning.cost_model import CostModel, cost_model
from cluster.planning.device_profile import device_profile, known_profiles
from cluster.planning.emulated_judge import EmulatedJudge
from cluster.planning.options import PlanOptions
from cluster.planning.placement import Affinity
from cluster.planning.plan import UNSERVED, Judgement, Plan, PlanSpec, Question
from cluster.planning.plan_output import plan_json, plan_markdown, plan_table, plan_yaml
from cluster.planning.planner import LinkRates, plan
from cluster.planning.plot_plan import plot_plan
from cluster.planning.trace import Trace, read_trace
from engine.errors import ConfigError
from engine.objectives import Objectives

# Links of a profile that does not name its own: DistServe's testbed, NVLink 300 GB/s one way, 25 Gbit/s between nodes.
DISTSERVE_LINKS = LinkRates(300e9, 25e9 / 8)


def run(options: PlanOptions) -> None:
    """Prints one JSON object, or a table, and writes the files of --out. Raises ConfigError naming the flag or the
    trace's line."""
    _check(options)
    trace = _trace(options)
    spec = PlanSpec(
        profile=options.profile,
        model=options.model,
        gpus=options.gpus,
        gpus_per_node=options.gpus_per_node,
        objectives=Objectives(options.ttft_ms / 1e3, options.tpot_ms / 1e3),
        affinity=cast(Affinity | None, options.affinity),
        seed=options.seed,
        router=options.router,
        keep=options.keep,
        requests=options.requests,
        processes=options.processes or os.cpu_count() or 1,
        time_budget_s=options.time_budget_s,
    )
    result = make_plan(spec, trace, None if options.as_json else print_judged)
    written = write_plan(result, options.out) if options.out is not None else []
    if options.as_json:
        print(json.dumps(plan_json(result) | {"files": [str(path) for path in written]}))
        return
    console = Console(highlight=False)
    console.print(plan_table(result))
    for path in written:
        console.print(f"wrote {path}")
    if written and spec.model in UNSERVED:
        console.print(f"no configuration was written: {spec.model} can be planned, not served")


def make_plan(spec: PlanSpec, trace: Trace, tell: Callable[[Question, Judgement], None] | None = None) -> Plan:
    """The plan of a spec, judged by the emulator; `tell` hears of each arrangement and worker that was judged."""
    cost_of = worker_costs(spec.model)
    judge = EmulatedJudge(spec, trace, cost_of, tell)
    return plan(spec, trace, cost_of, links_of(spec.profile), judge, time.monotonic)


def print_judged(question: Question, judged: Judgement) -> None:
    """One line on stderr: a plan takes minutes."""
    rate = f"{judged.goodput_rps:.3g} req/s" if judged.goodput_rps else "at no rate"
    print(f"judged {question.label}: {rate}", file=sys.stderr, flush=True)


def worker_costs(model: str) -> Callable[[str, Parallel], CostModel]:
    """Cost models of one model's workers by profile and parallelism, each made once."""

    @functools.cache
    def cost_of(profile: str, parallel: Parallel) -> CostModel:
        return cost_model(profile, model, tp=parallel.tp, pp=parallel.pp)

    return cost_of


def links_of(profile: str) -> LinkRates:
    """What a device's profile says of its links; DistServe's testbed for profiles that say nothing."""
    if profile not in known_profiles():
        try:
            measured = device_profile(profile)
        except ConfigError:
            return DISTSERVE_LINKS
        return LinkRates(measured.nvlink_bytes_s, measured.network_bytes_s)
    known = device_profile(profile)
    return LinkRates(known.nvlink_bytes_s, known.network_bytes_s)


def write_plan(result: Plan, out: Path) -> list[Path]:
    """The configuration (if anything was chosen), the page, the numbers and the picture: their paths."""
    cost_of = worker_costs(result.spec.model)
    profile = result.spec.profile
    written = []
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if result.chosen is not None and result.spec.model not in UNSERVED:
            out.write_text(plan_yaml(result, lambda parallel: cost_of(profile, parallel)), encoding="utf-8")
            written.append(out)
        for suffix, text in ((".md", plan_markdown(result)), (".json", json.dumps(plan_json(result), indent=1) + "\n")):
            out.with_suffix(suffix).write_text(text, encoding="utf-8")
            written.append(out.with_suffix(suffix))
        plot_plan(result, out.with_suffix(".png"))
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from None
    return [*written, out.with_suffix(".png")]


def _check(options: PlanOptions) -> None:
    for flag, count in (
        ("--gpus", options.gpus),
        ("--gpus-per-node", options.gpus_per_node),
        ("--requests", options.requests),
        ("--keep", options.keep),
        ("--limit", options.limit),
    ):
        if count is not None and count < 1:
            raise ConfigError(f"{flag}: got {count}, expected 1 or more")
    if options.gpus > options.gpus_per_node and options.gpus % options.gpus_per_node:
        raise ConfigError(
            f"--gpus: got {options.gpus}, expected whole nodes of --gpus-per-node, which is {options.gpus_per_node}"
        )
    for flag, time_ms in (("--ttft-ms", options.ttft_ms), ("--tpot-ms", options.tpot_ms)):
        if not 0 < time_ms < math.inf:
            raise ConfigError(f"{flag}: got {time_ms}, expected a positive number of milliseconds")
    require_policy(options.router, "--router")
    if options.affinity is not None and options.affinity not in get_args(Affinity):
        raise ConfigError(f"--affinity: got {options.affinity!r}, expected {' or '.join(get_args(Affinity))}")
    if options.processes < 0:
        raise ConfigError(f"--processes: got {options.processes}, expected 0 for one per CPU, or more")
    if options.out is not None and options.out.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--out: got {str(options.out)!r}, expected a name that ends in .yaml")


def _trace(options: PlanOptions) -> Trace:
    trace = read_trace(options.trace, options.limit)
    return trace.spread() if options.spread else trace
