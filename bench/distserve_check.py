"""The planner against DistServe's published results, on DistServe's own step times for OPT-13B on A100-80G.

    python -m bench.distserve_check [--profiles DIR] [--requests N] [--seeds N] [--json F]

artifact   4 GPUs, TTFT 200 ms, TPOT 100 ms: its simulator's README finds prefill tp 2, decode tp 1, 1.56 req/s per GPU
figure 8   TTFT 250 ms, TPOT 100 ms: the disaggregated plan against colocated workers with the times of its vLLM, whole
           prompts and chunked; the paper has 2.0 to 4.6 times on ShareGPT

Its length sample is not public here; bench/sharegpt_lengths.py has the one that is used. bench/distserve_rules.py
judges the same sample by its simulator's own rules, which tells a difference of rules from one of lengths.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.distserve_rules import best_rate_rps
from bench.report import stamp, table
from bench.sharegpt_lengths import PROMPT_SIGMA, as_trace, mean, sharegpt_like
from cluster.command_plan import DISTSERVE_LINKS, make_plan, worker_costs
from cluster.planning.arrangement import Arrangement, Parallel, Pool
from cluster.planning.emulated_judge import EmulatedJudge, timed
from cluster.planning.plan import Arm, Judgement, Plan, PlanSpec, Question
from engine.errors import ConfigError
from engine.objectives import Objectives

MODEL = "opt-13b"
OWN, VLLM = "profiler-a100-80g.distserve.json", "profiler-a100-80g.vllm.json"
DEFAULT_PROFILES = Path(__file__).parents[2] / "shared" / "data" / "profiles"
ARTIFACT, FIGURE_8 = Objectives(0.2, 0.1), Objectives(0.25, 0.1)
# Its README: one node of four A100.
PUBLISHED_LABEL, PUBLISHED_RPS_PER_GPU = "1P tp2 + 1D tp1", 1.56
CHUNKS = (128, 256, 512, 1024)


@dataclass(frozen=True, slots=True)
class Setting:
    """Where the profiles lie, and how much is emulated."""

    profiles: Path
    requests: int
    seed: int
    processes: int

    @property
    def own(self) -> str:
        return str(self.profiles / OWN)

    @property
    def vllm(self) -> str:
        return str(self.profiles / VLLM)

    def spec(self, objectives: Objectives, **changes: Any) -> PlanSpec:  # noqa: ANN401
        base = PlanSpec(
            profile=self.own,
            model=MODEL,
            gpus=4,
            gpus_per_node=4,
            objectives=objectives,
            goal="gpu",
            seed=self.seed,
            requests=self.requests,
            processes=self.processes,
            keep=4,
        )
        return replace(base, **changes)


def artifact(setting: Setting) -> tuple[Plan, Arm]:
    """The plan with the best goodput for each GPU used, and its best disaggregated arrangement."""
    lengths = sharegpt_like(setting.requests, setting.seed)
    result = make_plan(setting.spec(ARTIFACT), as_trace(lengths))
    best = result.best("disaggregated")
    assert best is not None, "no disaggregated arrangement was judged"
    return result, best


def by_its_rules(setting: Setting, mean_prompt_scale: float = 1.0) -> dict[str, float]:
    """Requests a second for each GPU of every pair that fits 4 GPUs, as its simulator judges."""
    lengths = sharegpt_like(setting.requests, setting.seed)
    lengths = [(min(2047 - output, max(4, round(prompt * mean_prompt_scale))), output) for prompt, output in lengths]
    costs = worker_costs(MODEL)
    rates = {}
    for prefill_tp, decode_tp in ((1, 1), (2, 1), (1, 2), (2, 2)):
        prefill, decode = (costs(setting.own, Parallel(tp)) for tp in (prefill_tp, decode_tp))
        gpus = prefill_tp + decode_tp
        rate = best_rate_rps(lengths, gpus, ARTIFACT, prefill.step_s, decode.step_s)
        label = Arrangement(Pool(Parallel(prefill_tp), 1), Pool(Parallel(decode_tp), 1)).label
        rates[label] = rate / gpus
    return rates


def length_that_explains(setting: Setting) -> float | None:
    """How many times as long prompts would have to be for its rules to give its published rate."""
    for percent in range(100, 161, 5):
        if by_its_rules(setting, percent / 100)[PUBLISHED_LABEL] <= PUBLISHED_RPS_PER_GPU + 0.005:
            return percent / 100
    return None


def figure_8(setting: Setting) -> list[tuple[str, str, int, Judgement]]:
    """(times, arrangement, GPUs, judgement) of the plan's pair and of single workers: whole prompts, chunks."""
    lengths = sharegpt_like(setting.requests, setting.seed)
    trace = timed(as_trace(lengths), setting.seed)
    costs = worker_costs(MODEL)
    pair = Arrangement(Pool(Parallel(2), 1), Pool(Parallel(1), 1))
    rows = []
    for name, profile in (("DistServe", setting.own), ("vLLM", setting.vllm)):
        spec = setting.spec(FIGURE_8, colocated_profile=profile)
        arrangements = [
            Arrangement(colocated=Pool(Parallel(tp), 1), chunk_tokens=chunk)
            for tp in (1, 2)
            for chunk in (None, *CHUNKS)
        ]
        if profile == setting.own:
            arrangements = [pair, *arrangements]
        questions = [Question(each, "both", 1.5 * each.gpus, DISTSERVE_LINKS.nvlink_bytes_s) for each in arrangements]
        judged = EmulatedJudge(spec, trace, costs)(questions)
        rows += [(name, each.label, each.gpus, answer) for each, answer in zip(arrangements, judged, strict=True)]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profiles", type=Path, default=DEFAULT_PROFILES, help="folder with DistServe's fits")
    parser.add_argument("--requests", type=int, default=300, help="of the length sample; DistServe takes 300")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="where all numbers go")
    options = parser.parse_args()
    if not (options.profiles / OWN).is_file():
        raise ConfigError(f"--profiles {options.profiles}: has no {OWN}")
    setting = Setting(options.profiles, options.requests, options.seed, options.processes)
    lengths = sharegpt_like(setting.requests, setting.seed)
    print(_describe(lengths))
    results = {"artifact": _print_artifact(setting), "figure_8": _print_figure_8(setting)}
    print("\n" + stamp(f"{os.cpu_count()} CPUs"))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _describe(lengths: list[tuple[int, int]]) -> str:
    prompts, outputs = sorted(row[0] for row in lengths), sorted(row[1] for row in lengths)
    spread = [f"p50 {each[len(each) // 2]}, p90 {each[9 * len(each) // 10]}" for each in (prompts, outputs)]
    return (
        f"{len(lengths)} requests: prompts {mean(prompts):.0f} tokens on average ({spread[0]}; log-normal, sigma "
        f"{PROMPT_SIGMA}), answers {mean(outputs):.0f} ({spread[1]})"
    )


def _print_artifact(setting: Setting) -> dict[str, Any]:
    result, best = artifact(setting)
    rules = by_its_rules(setting)
    print("\n## Artifact check: OPT-13B, 4 A100, TTFT 200 ms, TPOT 100 ms\n")
    rows = [
        [
            arm.arrangement.label,
            f"{arm.rps_per_gpu:.2f}",
            f"{rules.get(arm.arrangement.label, 0.0):.2f}" if arm.arrangement.label in rules else "-",
        ]
        for arm in result.arms
    ]
    print(table(["arrangement", "req/s per GPU, planner", "its simulator's rules, same lengths"], rows))
    print("\nNot judged:\n" + "\n".join(f"- {pruned.label}: {pruned.reason}" for pruned in result.pruned))
    longer = length_that_explains(setting)
    print(
        f"\nDistServe publishes {PUBLISHED_LABEL}, {PUBLISHED_RPS_PER_GPU} req/s per GPU. The planner's best "
        f"disaggregated arrangement: {best.arrangement.label}, {best.rps_per_gpu:.2f}. Best by its rules on these "
        f"lengths: {max(rules, key=lambda label: rules[label])}, {max(rules.values()):.2f}."
    )
    if longer is not None:
        print(f"Its rules give its number when prompts are {longer:.2f} times as long as in this sample.")
    return {
        "published": {"label": PUBLISHED_LABEL, "rps_per_gpu": PUBLISHED_RPS_PER_GPU},
        "planner": [{"label": arm.arrangement.label, "rps_per_gpu": arm.rps_per_gpu} for arm in result.arms],
        "pruned": [{"label": pruned.label, "reason": pruned.reason} for pruned in result.pruned],
        "its_rules": rules,
        "prompt_scale_for_its_number": longer,
    }


def _print_figure_8(setting: Setting) -> list[dict[str, Any]]:
    rows = figure_8(setting)
    print("\n## Figure 8: TTFT 250 ms, TPOT 100 ms\n")
    own = rows[0][3].goodput_rps / rows[0][2]
    heads = ["step times", "arrangement", "req/s per GPU", "DistServe's pair is", "TTFT p90", "TPOT p90"]
    cells, values = [], []
    for name, label, gpus, judged in rows:
        rate = judged.goodput_rps / gpus
        ratio = own / rate if rate else None
        cells.append(
            [
                name,
                label,
                f"{rate:.2f}",
                "-" if ratio is None else f"{ratio:.2f} x",
                "-" if judged.ttft_p90_s is None else f"{judged.ttft_p90_s * 1e3:.0f} ms",
                "-" if judged.tpot_p90_s is None else f"{judged.tpot_p90_s * 1e3:.0f} ms",
            ]
        )
        values.append({"times": name, "label": label, "gpus": gpus, "rps_per_gpu": rate, "pair_over_this": ratio})
    print(table(heads, cells))
    return values


if __name__ == "__main__":
    main()
