"""The planner against DistServe's published results, on DistServe's own step times for OPT-13B on A100-80G.

    python -m bench.distserve_check [--part artifact|figure-8] [--prompt-sigma S] [--requests N] [--router NAME] ...

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
from cluster.commands.plan import DISTSERVE_LINKS, make_plan, print_judged, worker_costs
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
PAIR = Arrangement(Pool(Parallel(2), 1), Pool(Parallel(1), 1))
# Of colocated workers: None is whole prompts, as engines ran them before chunking.
CHUNKS = (None, 512)
RANKS = (1, 2, 4)


@dataclass(frozen=True, slots=True)
class Setting:
    """Where the profiles lie, and how much is emulated."""

    profiles: Path
    requests: int
    seed: int
    processes: int
    router: str
    prompt_sigma: float

    def lengths(self) -> list[tuple[int, int]]:
        return sharegpt_like(self.requests, self.seed, self.prompt_sigma)

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
            router=self.router,
            allow_local=False,
        )
        return replace(base, **changes)


def artifact(setting: Setting) -> tuple[Plan, Arm]:
    """The plan with the best goodput for each GPU used, and its best disaggregated arrangement."""
    lengths = setting.lengths()
    result = make_plan(setting.spec(ARTIFACT), as_trace(lengths), print_judged)
    best = result.best("disaggregated")
    assert best is not None, "no disaggregated arrangement was judged"
    return result, best


def by_its_rules(setting: Setting, mean_prompt_scale: float = 1.0) -> dict[str, float]:
    """Requests a second for each GPU of every pair that fits 4 GPUs, as its simulator judges."""
    lengths = setting.lengths()
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


@dataclass(frozen=True, slots=True)
class Colocation:
    """One arrangement of figure 8 with the step times of one engine. `rules_rps`: by DistServe's simulator's rules,
    None where they do not know it (chunks)."""

    times: str
    arrangement: Arrangement
    judged: Judgement
    rules_rps: float | None

    @property
    def rps_per_gpu(self) -> float:
        return self.judged.goodput_rps / self.arrangement.gpus


def figure_8(setting: Setting) -> list[Colocation]:
    """The plan's pair, then single colocated workers with either engine's times: whole prompts, and chunks."""
    lengths = setting.lengths()
    trace = timed(as_trace(lengths), setting.seed)
    costs = worker_costs(MODEL)
    rows = []
    for name, profile in (("DistServe", setting.own), ("vLLM", setting.vllm)):
        spec = setting.spec(FIGURE_8, colocated_profile=profile)
        arrangements = [
            Arrangement(colocated=Pool(Parallel(tp), 1), chunk_tokens=chunk) for tp in RANKS for chunk in CHUNKS
        ]
        if profile == setting.own:
            arrangements = [PAIR, *arrangements]
        questions = [Question(each, "both", 1.5 * each.gpus, DISTSERVE_LINKS.nvlink_bytes_s) for each in arrangements]
        judged = EmulatedJudge(spec, trace, costs, print_judged)(questions)
        rows += [
            Colocation(name, each, answer, _by_rules(each, profile, lengths))
            for each, answer in zip(arrangements, judged, strict=True)
        ]
    return rows


def _by_rules(arrangement: Arrangement, profile: str, lengths: list[tuple[int, int]]) -> float | None:
    if arrangement.chunk_tokens is not None:
        return None
    costs = worker_costs(MODEL)
    pools = [pool for pool in (arrangement.prefill, arrangement.decode, arrangement.colocated) if pool is not None]
    prefill, decode = costs(profile, pools[0].parallel), costs(profile, pools[-1].parallel)
    is_colocated = arrangement.colocated is not None
    return best_rate_rps(
        lengths, arrangement.gpus, FIGURE_8, prefill.step_s, decode.step_s, colocated=is_colocated, precision=0.05
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profiles", type=Path, default=DEFAULT_PROFILES, help="folder with DistServe's fits")
    parser.add_argument("--requests", type=int, default=300, help="of the length sample; DistServe takes 300")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--prompt-sigma", type=float, default=PROMPT_SIGMA, help="spread of the prompts' lengths")
    parser.add_argument("--part", choices=("artifact", "figure-8", "both"), default="both")
    parser.add_argument("--router", default="least_loaded", help="least_loaded is DistServe's: it refuses nobody")
    parser.add_argument("--json", type=Path, help="where all numbers go")
    options = parser.parse_args()
    if not (options.profiles / OWN).is_file():
        raise ConfigError(f"--profiles {options.profiles}: has no {OWN}")
    setting = Setting(
        options.profiles, options.requests, options.seed, options.processes, options.router, options.prompt_sigma
    )
    lengths = setting.lengths()
    print(_describe(lengths, setting.prompt_sigma))
    results: dict[str, Any] = {"lengths": lengths}
    if options.part != "figure-8":
        results["artifact"] = _print_artifact(setting)
    if options.part != "artifact":
        results["figure_8"] = _print_figure_8(setting)
    print("\n" + stamp(f"{os.cpu_count()} CPUs"))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _describe(lengths: list[tuple[int, int]], prompt_sigma: float) -> str:
    prompts, outputs = sorted(row[0] for row in lengths), sorted(row[1] for row in lengths)
    spread = [f"p50 {each[len(each) // 2]}, p90 {each[9 * len(each) // 10]}" for each in (prompts, outputs)]
    return (
        f"{len(lengths)} requests: prompts {mean(prompts):.0f} tokens on average ({spread[0]}; log-normal, sigma "
        f"{prompt_sigma}), answers {mean(outputs):.0f} ({spread[1]})"
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
    own, own_rules = rows[0].rps_per_gpu, (rows[0].rules_rps or 0.0) / PAIR.gpus
    print("\n## Figure 8: TTFT 250 ms, TPOT 100 ms\n")
    heads = ["step times", "arrangement", "req/s per GPU", "the pair is", "TTFT p90", "TPOT p90"]
    heads += ["its rules, per GPU", "the pair is"]
    cells, values = [], []
    for row in rows:
        rules = None if row.rules_rps is None else row.rules_rps / row.arrangement.gpus
        cells.append(
            [
                row.times,
                row.arrangement.label,
                f"{row.rps_per_gpu:.2f}",
                _times(own, row.rps_per_gpu),
                "-" if row.judged.ttft_p90_s is None else f"{row.judged.ttft_p90_s * 1e3:.0f} ms",
                "-" if row.judged.tpot_p90_s is None else f"{row.judged.tpot_p90_s * 1e3:.0f} ms",
                "-" if rules is None else f"{rules:.2f}",
                "-" if rules is None else _times(own_rules, rules),
            ]
        )
        values.append(
            {
                "times": row.times,
                "label": row.arrangement.label,
                "gpus": row.arrangement.gpus,
                "rps_per_gpu": row.rps_per_gpu,
                "its_rules_rps_per_gpu": rules,
            }
        )
    print(table(heads, cells))
    return values


def _times(mine: float, other: float) -> str:
    return f"{mine / other:.2f} x" if other else "it alone"


if __name__ == "__main__":
    main()
