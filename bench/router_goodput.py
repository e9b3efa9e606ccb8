"""The goodput router beside the five baselines: 8 prefill and 8 decode workers, Llama-3.1-8B on H200, every trace.

    python -m bench.router_goodput [--traces azure2023_code …] [--limit 3000] [--processes 2] [--write router-goodput]

Emulated, so no GPU made these figures. Each arm's goodput is searched by itself: the highest rate of the same trace at
which 90 % of its requests meet both objectives (bench/trace_objectives.py), every reject and time-out being a miss.
Besides the routers there is one arm without disaggregation: the same 16 GPUs as colocated workers with chunked prefill.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.report import stamp, table, write_section
from bench.trace_objectives import TRACE_OBJECTIVES
from cluster.planning.emulation_spec import EmulationSpec
from cluster.planning.goodput import find_goodput
from cluster.planning.trace import read_trace

TRACES = Path(__file__).parents[2] / "shared" / "data" / "traces"
BASELINES = ("round_robin", "random", "least_loaded", "power_of_two", "prefix_affinity")
COLOCATED = "16 colocated"
# Where each search begins, in requests per second, and the shortest of its runs: several times as long as an answer
# takes, or queues and batches would not be those of the rate.
SEARCHES = {
    "azure2023_conv": (300.0, 20.0),
    "azure2023_code": (50.0, 30.0),
    "mooncake_conversation": (20.0, 60.0),
    "mooncake_synthetic": (20.0, 60.0),
    "servegen_deepseek_r1.sampled": (150.0, 60.0),
}
# A search ends within this part of the answer.
TOLERANCE = 0.04
ARMS = (*BASELINES, "goodput", COLOCATED)


@dataclass(frozen=True, slots=True)
class Arm:
    """One search: a trace under one router."""

    trace: str
    arm: str
    limit: int
    seed: int


def spec_of(arm: Arm) -> EmulationSpec:
    """16 H200: split in half, or not split at all."""
    is_split = arm.arm != COLOCATED
    return EmulationSpec(
        profile="h200",
        model="llama-3.1-8b",
        prefill=8 if is_split else 0,
        decode=8 if is_split else 0,
        colocated=0 if is_split else 16,
        router=arm.arm if is_split else "goodput",
        objectives=TRACE_OBJECTIVES[arm.trace],
        seed=arm.seed,
        # 91,000-token prompts in blocks of 16 make the emulator slow; the traces share prefixes in blocks of 512.
        block_size=64,
    )


def search(arm: Arm) -> tuple[Arm, float]:
    """(the arm, its goodput in requests per second of all 16 GPUs)"""
    # Mooncake's clock ticks every 3 s; nobody's requests do.
    trace = read_trace(TRACES / f"{arm.trace}.jsonl", arm.limit).spread()
    start_rps, span_s = SEARCHES[arm.trace]
    found = find_goodput(spec_of(arm), trace, tolerance=TOLERANCE, start_rps=start_rps, min_span_s=span_s)
    return arm, found.rps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", nargs="+", default=list(TRACE_OBJECTIVES), choices=list(TRACE_OBJECTIVES))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--limit", type=int, default=3000, help="requests of each trace")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", metavar="BLOCK", help="put the table into docs/performance.md")
    arguments = parser.parse_args()
    if not TRACES.exists():
        sys.exit(f"{TRACES} is not there: these traces are not part of the repository")
    arms = [Arm(trace, arm, arguments.limit, arguments.seed) for trace in arguments.traces for arm in arguments.arms]
    found: dict[tuple[str, str], float] = {}
    with ProcessPoolExecutor(arguments.processes, max_tasks_per_child=1) as pool:
        for arm, rps in pool.map(search, arms):
            found[arm.trace, arm.arm] = rps
            print(f"{arm.trace:30} {arm.arm:16} {rps:8.2f} req/s", flush=True)
    text = stamp("emulated: 16 H200") + "\n\n" + report(arguments.traces, arguments.arms, found)
    print(text)
    if arguments.write:
        write_section(arguments.write, text)


def report(traces: list[str], arms: list[str], found: dict[tuple[str, str], float]) -> str:
    """The Markdown table: requests per second of 16 GPUs, and the goodput router over the best baseline."""
    rows: list[list[str]] = []
    for trace in traces:
        objectives = TRACE_OBJECTIVES[trace]
        row = [trace, f"{(objectives.ttft_s or 0.0) * 1e3:g} / {(objectives.tpot_s or 0.0) * 1e3:g}"]
        row += [f"{found[trace, arm]:.1f}" for arm in arms]
        best = max((found[trace, arm] for arm in arms if arm in BASELINES), default=0.0)
        row.append(f"{found[trace, 'goodput'] / best:.2f}" if best and "goodput" in arms else "")
        rows.append(row)
    return table(["trace", "TTFT / TPOT, ms", *arms, "goodput / best baseline"], rows)


if __name__ == "__main__":
    main()
