"""The goodput router beside the five baselines: 8 prefill and 8 decode workers, Llama-3.1-8B on H200, every trace.

    python -m bench.router_goodput [--traces azure2023_code …] [--limit 3000] [--processes 2] [--write router-goodput]

Emulated, so no GPU made these figures. Each arm's goodput is searched by itself: the highest rate of the same trace at
which 90 % of its requests meet both objectives (bench/trace_objectives.py), every reject and time-out being a miss.
Only the best baseline matters: one that is not better than another by more than the tolerance of a search is not
searched further, and shown as "< rate".
Besides the routers there is one arm without disaggregation: the same 16 GPUs as colocated workers with chunked prefill.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

from bench.report import stamp, table, write_section
from bench.trace_objectives import TRACE_OBJECTIVES
from cluster.planning.emulation_spec import EmulationSpec
from cluster.planning.goodput import attains, find_goodput
from cluster.planning.trace import read_trace

TRACES = Path(__file__).parents[2] / "shared" / "data" / "traces"
# Those that tend to be best come first: the others then end quickly.
BASELINES = ("prefix_affinity", "least_loaded", "power_of_two", "round_robin", "random")
COLOCATED = "16 colocated"
ARMS = (*BASELINES, "goodput", COLOCATED)
# Where each search begins, in requests per second, and the shortest of its runs: several times as long as an answer
# takes, or queues and batches would not be those of the rate.
SEARCHES = {
    "azure2023_conv": (350.0, 12.0),
    "azure2023_code": (50.0, 30.0),
    "mooncake_conversation": (25.0, 60.0),
    "mooncake_synthetic": (20.0, 60.0),
    "servegen_deepseek_r1.sampled": (100.0, 60.0),
}
# A search ends within this part of the answer.
TOLERANCE = 0.06


@dataclass(frozen=True, slots=True)
class Row:
    """What one trace gave, in requests per second of all 16 GPUs. `failed_at`: of baselines that were not searched."""

    trace: str
    found: dict[str, float]
    failed_at: dict[str, float]

    @property
    def best_rps(self) -> float:
        """Of the baselines."""
        return max((self.found[arm] for arm in BASELINES if arm in self.found), default=0.0)

    def shown(self, arm: str) -> str:
        return f"{self.found[arm]:.1f}" if arm in self.found else f"< {self.failed_at[arm]:.1f}"


def spec_of(trace: str, arm: str, seed: int) -> EmulationSpec:
    """16 H200: split in half, or not split at all."""
    is_split = arm != COLOCATED
    return EmulationSpec(
        profile="h200",
        model="llama-3.1-8b",
        prefill=8 if is_split else 0,
        decode=8 if is_split else 0,
        colocated=0 if is_split else 16,
        router=arm if is_split else "goodput",
        objectives=TRACE_OBJECTIVES[trace],
        seed=seed,
        # 91,000-token prompts in blocks of 16 make the emulator slow; the traces share prefixes in blocks of 512.
        block_size=64,
    )


def search(name: str, limit: int, seed: int) -> Row:
    """All arms of one trace."""
    # Mooncake's clock ticks every 3 s; nobody's requests do.
    trace = read_trace(TRACES / f"{name}.jsonl", limit).spread()
    start_rps, span_s = SEARCHES[name]
    row = Row(name, {}, {})
    for arm in ARMS:
        spec = spec_of(name, arm, seed)
        best_rps = row.best_rps
        better_rps = (1 + TOLERANCE) * best_rps
        if arm in BASELINES and best_rps and not attains(spec, trace, better_rps, min_span_s=span_s):
            row.failed_at[arm] = better_rps
        else:
            first_rps = row.found.get("goodput") or best_rps or start_rps
            goodput = find_goodput(spec, trace, tolerance=TOLERANCE, start_rps=first_rps, min_span_s=span_s)
            row.found[arm] = goodput.rps
        print(f"{name:30} {arm:16} {row.shown(arm):>8} req/s", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", nargs="+", default=list(TRACE_OBJECTIVES), choices=list(TRACE_OBJECTIVES))
    parser.add_argument("--limit", type=int, default=3000, help="requests of each trace")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", metavar="BLOCK", help="put the table into docs/performance.md")
    arguments = parser.parse_args()
    if not TRACES.exists():
        sys.exit(f"{TRACES} is not there: these traces are not part of the repository")
    with ProcessPoolExecutor(arguments.processes, max_tasks_per_child=1) as pool:
        traces = arguments.traces
        rows = list(pool.map(search, traces, repeat(arguments.limit), repeat(arguments.seed)))
    text = stamp("emulated: 16 H200") + "\n\n" + report(rows)
    print(text)
    if arguments.write:
        write_section(arguments.write, text)


def report(rows: Sequence[Row]) -> str:
    """The Markdown table, and the goodput router over the best baseline."""
    lines: list[list[str]] = []
    for row in rows:
        objectives = TRACE_OBJECTIVES[row.trace]
        line = [row.trace, f"{(objectives.ttft_s or 0.0) * 1e3:g} / {(objectives.tpot_s or 0.0) * 1e3:g}"]
        line += [row.shown(arm) for arm in ARMS]
        line.append(f"{row.found['goodput'] / row.best_rps:.2f}" if row.best_rps else "–")
        lines.append(line)
    return table(["trace", "TTFT / TPOT, ms", *ARMS, "goodput / best baseline"], lines)


if __name__ == "__main__":
    main()
