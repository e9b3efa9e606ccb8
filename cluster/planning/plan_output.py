"""A plan for people and for programs: a table, Markdown, JSON, and the configuration that `tandem serve` takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cluster.planning.arrangement import Arrangement, Parallel, Pool
from cluster.planning.bounds import PlanCost
from cluster.planning.emulated_cluster import MOST_TOKEN_BUDGET, decode_config, prefill_config
from cluster.planning.plan import Arm, Plan
from engine.config import DEFAULT_MODEL
from engine.errors import ConfigError

HEADINGS = ("arrangement", "GPUs", "req/s", "per GPU", "TTFT p90", "TPOT p90", "attained", "bound")
# Where the weights of the built-in shapes are, for the engine; any other name or path is the engine's to find.
WEIGHTS = {
    "smollm2-135m": DEFAULT_MODEL,
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B-Instruct",
    "qwen3-8b": "Qwen/Qwen3-8B",
}


def plan_table(plan: Plan) -> Group:
    """What `tandem plan` prints: the answer, the judged arrangements best first, what was not judged and why."""
    table = Table(title=_title(plan), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(HEADINGS[0], no_wrap=True)
    for heading in HEADINGS[1:]:
        table.add_column(heading, justify="right")
    for arm in plan.arms:
        table.add_row(*_row(arm), style="bold" if arm is plan.chosen else "")
    parts: list[Table | Text] = [table]
    if plan.pruned:
        parts += [Text("Not judged:"), *(Text(f"  {pruned.label}: {pruned.reason}") for pruned in plan.pruned)]
    parts += [Text(f"Note: {note}") for note in plan.notes]
    return Group(*parts, Text(plan.answer, style="bold"))


def plan_markdown(plan: Plan) -> str:
    """The same as a page."""
    lines = [f"**{plan.answer}**", "", _title(plan), "", _markdown_row(HEADINGS)]
    lines.append("|" + "---|" + "---:|" * (len(HEADINGS) - 1))
    lines += [_markdown_row(_row(arm)) for arm in plan.arms]
    if plan.phases:
        lines += ["", "One worker alone:", "", "| worker | req/s | per GPU |", "|---|---:|---:|"]
        lines += [f"| {arm.label} | {arm.rps:.3g} | {arm.rps / arm.gpus:.3g} |" for arm in plan.phases]
    if plan.pruned:
        lines += ["", "Not judged:", "", *(f"- {pruned.label}: {pruned.reason}" for pruned in plan.pruned)]
    lines += ["", *(f"Note: {note}" for note in plan.notes)] if plan.notes else []
    return "\n".join(lines) + "\n"


def plan_json(plan: Plan) -> dict[str, Any]:
    """What `tandem plan --json` prints."""
    spec = plan.spec
    return {
        "answer": plan.answer,
        "disaggregate": None if plan.chosen is None else plan.chosen.arrangement.kind == "disaggregated",
        "chosen": None if plan.chosen is None else _arm_json(plan.chosen),
        "arms": [_arm_json(arm) for arm in plan.arms],
        "workers": [{"phase": arm.phase, "label": arm.label, "gpus": arm.gpus, "rps": arm.rps} for arm in plan.phases],
        "pruned": [{"label": pruned.label, "reason": pruned.reason} for pruned in plan.pruned],
        "notes": list(plan.notes),
        "profile": spec.profile,
        "model": spec.model,
        "gpus": spec.gpus,
        "gpus_per_node": spec.gpus_per_node,
        "affinity": plan.affinity,
        "ttft_ms": _ms(spec.objectives.ttft_s),
        "tpot_ms": _ms(spec.objectives.tpot_s),
        "target": spec.target,
        "seed": spec.seed,
        "trace": {
            "requests": plan.trace_requests,
            "rps": plan.trace_rps,
            "mean_prompt_tokens": plan.mean_prompt_tokens,
            "mean_output_tokens": plan.mean_output_tokens,
        },
        "transfer_ms": plan.transfer_s * 1e3,
    }


def plan_yaml(plan: Plan, cost_of: Callable[[Parallel], PlanCost]) -> str:
    """The chosen arrangement as the configuration of `tandem serve --config`, with the answer as its first lines.

    Budgets and limits are those that were emulated. `cost_of`: a worker's cost model, for its memory. Raises
    ConfigError for a plan that chose nothing.
    """
    if plan.chosen is None:
        raise ConfigError(f"plan: nothing to configure. {plan.answer}")
    arrangement, spec = plan.chosen.arrangement, plan.spec
    pools = [pool for pool in (arrangement.prefill, arrangement.decode, arrangement.colocated) if pool is not None]
    costs = [cost_of(pool.parallel) for pool in pools]
    rank_bytes = min(cost.kv_bytes(cost.kv_capacity_tokens) // cost.gpus for cost in costs)
    workers = sum(pool.count for pool in pools) * arrangement.units
    decode_options = decode_config(costs[-1])
    budget = decode_options.local_token_budget
    if arrangement.colocated is not None:
        budget = arrangement.chunk_tokens or LONGEST_STEP
    router: dict[str, Any] = {"policy": spec.router, "local_chunk_tokens": budget}
    values: dict[str, Any] = {"engine": {"model": weights_of(spec.model), "kv_cache_bytes": rank_bytes}}
    if arrangement.prefill is not None:
        prefill_options = prefill_config(costs[0])
        values["prefill"] = prefill_options.model_dump(include={"token_budget", "max_batch_prompts", "max_queued"})
        router["prefill_chunk_tokens"] = prefill_options.token_budget
    values["decode"] = decode_options.model_dump(include={"max_batch", "max_queued", "max_transfers"})
    values["decode"]["local_token_budget"] = budget
    values["gateway"] = {
        # As many as the workers take: it is the router that decides.
        "max_running": workers * decode_options.max_queued,
        "max_waiting": workers * decode_options.max_queued,
        "objectives": {"ttft_ms": _ms(spec.objectives.ttft_s), "tpot_ms": _ms(spec.objectives.tpot_s)},
        "router": router,
    }
    values["cluster"] = {**_cluster(arrangement), "profile": spec.profile}
    head = "".join(f"# {line}\n" for line in (plan.answer, _title(plan)))
    return head + yaml.safe_dump(values, sort_keys=False, width=120)


# A step of whole prompts is this long at most.
LONGEST_STEP = MOST_TOKEN_BUDGET


def weights_of(model: str) -> str:
    """What `engine.model` must say to serve a planned model: a config.json stands for its folder."""
    path = Path(model)
    return WEIGHTS.get(model) or (str(path.parent) if path.name == "config.json" else model)


def _cluster(arrangement: Arrangement) -> dict[str, Any]:
    """Counts and [tensor, pipeline] degrees by role."""
    if arrangement.colocated is not None:
        pool = arrangement.colocated
        counts = {"prefill": 0, "decode": 0, "colocated": pool.count * arrangement.units}
        return counts | {"decode_parallel": _degrees(pool)}
    assert arrangement.prefill is not None
    assert arrangement.decode is not None
    return {
        "prefill": arrangement.prefill.count * arrangement.units,
        "decode": arrangement.decode.count * arrangement.units,
        "prefill_parallel": _degrees(arrangement.prefill),
        "decode_parallel": _degrees(arrangement.decode),
    }


def _degrees(pool: Pool) -> list[int]:
    return [pool.parallel.tp, pool.parallel.pp]


def _title(plan: Plan) -> str:
    spec = plan.spec
    objectives = f"TTFT {_ms(spec.objectives.ttft_s):g} ms, TPOT {_ms(spec.objectives.tpot_s):g} ms"
    nodes = f"in nodes of {spec.gpus_per_node}, {plan.affinity} affinity"
    lengths = f"{plan.mean_prompt_tokens:.0f} in, {plan.mean_output_tokens:.0f} out on average"
    return f"{spec.model} on {spec.gpus} x {spec.profile} {nodes}; {objectives} for {spec.target:.0%}; {lengths}"


def _row(arm: Arm) -> tuple[str, ...]:
    judged = arm.judgement
    return (
        arm.arrangement.label,
        str(arm.arrangement.gpus),
        f"{arm.goodput_rps:.3g}",
        f"{arm.rps_per_gpu:.3g}",
        _ms_text(judged.ttft_p90_s),
        _ms_text(judged.tpot_p90_s),
        f"{judged.attainment:.1%}",
        f"{arm.bound_rps:.3g}",
    )


def _markdown_row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def _arm_json(arm: Arm) -> dict[str, Any]:
    judged = arm.judgement
    return {
        "label": arm.arrangement.label,
        "kind": arm.arrangement.kind,
        **_cluster(arm.arrangement),
        "chunk_tokens": arm.arrangement.chunk_tokens,
        "units": arm.arrangement.units,
        "gpus": arm.arrangement.gpus,
        "goodput_rps": arm.goodput_rps,
        "goodput_rps_per_gpu": arm.rps_per_gpu,
        "attainment": judged.attainment,
        "ttft_p90_ms": None if judged.ttft_p90_s is None else judged.ttft_p90_s * 1e3,
        "tpot_p90_ms": None if judged.tpot_p90_s is None else judged.tpot_p90_s * 1e3,
        "estimate_rps": arm.estimate_rps,
        "bound_rps": arm.bound_rps,
    }


def _ms(seconds: float | None) -> float:
    assert seconds is not None, "a plan has both objectives"
    return round(seconds * 1e3, 6)


def _ms_text(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"
