"""Twice the load that can be met: does goodput hold, do accepts swing, and how soon does a rejected client know?

    python -m bench.overload [--limit 4000] [--write overload]

Emulated: 2 prefill and 2 decode workers, Llama-3.1-8B on H200, the goodput router. Two kinds of load: Poisson arrivals
at a constant rate with the lengths of azure2023_conv, and the bursty azure2023_code trace. For each the goodput is
searched first; then rates from a half to twice of it are offered, for a minute at least. Reported of each rate:
requests per second that met both objectives and its ratio to the best of all rates; the lag-1 autocorrelation of
accepts per second (a router that swings between too many and too few has it near -1); and how long rejected requests
took to be told, with how many of them were told late: they had been put off before.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from bench.report import stamp, table, write_section
from bench.router_goodput import TRACES
from bench.trace_objectives import TRACE_OBJECTIVES
from cluster.planning.arrivals import arrivals
from cluster.planning.emulation_result import EmulationResult, Ending
from cluster.planning.emulation_spec import EmulationSpec
from cluster.planning.emulator import emulate
from cluster.planning.goodput import find_goodput
from cluster.planning.trace import Trace, read_trace

SCALES = (0.5, 0.8, 1.0, 1.25, 1.5, 2.0)
LOADS = ("constant", "bursty code")
WORKERS = 2
# Many times as long as an answer takes, and enough seconds for an autocorrelation.
SPAN_S = 60.0
TOLD_S = 0.05
# Where the searches begin: nearer than the traces' own rates.
START_RPS = {"constant": 120.0, "bursty code": 25.0}


@dataclass(frozen=True, slots=True)
class Point:
    """What one rate gave. `reject_s`: the slowest rejection; 0.0 where none was. `told_late`: rejected after more than
    `TOLD_S`."""

    load: str
    scale: float
    rate_rps: float
    attainment: float
    rejected: int
    accept_autocorrelation: float
    reject_s: float
    told_late: int

    @property
    def met_rps(self) -> float:
        return self.attainment * self.rate_rps


def load_of(name: str, limit: int) -> Trace:
    if name == "bursty code":
        return read_trace(TRACES / "azure2023_code.jsonl", limit)
    trace = read_trace(TRACES / "azure2023_conv.jsonl", limit)
    rng = random.Random(1)
    times_s = arrivals(trace.rate_rps, len(trace), "poisson", 1.0, rng)
    requests = list(trace.requests)
    rng.shuffle(requests)
    return Trace(tuple(requests)).arriving(times_s)


def spec_of(name: str) -> EmulationSpec:
    objectives = TRACE_OBJECTIVES["azure2023_code" if name == "bursty code" else "azure2023_conv"]
    return EmulationSpec(
        profile="h200",
        model="llama-3.1-8b",
        prefill=WORKERS,
        decode=WORKERS,
        router="goodput",
        objectives=objectives,
        block_size=64,
    )


def measure(job: tuple[str, int, float, float]) -> Point:
    """(load, limit, rate scale of the goodput's rate, that scale over the goodput) → what it gave."""
    name, limit, rate_scale, scale = job
    trace = load_of(name, limit).scaled(rate_scale)
    result = emulate(spec_of(name), trace.repeated(math.ceil(SPAN_S / trace.arrivals_s[-1])))
    rejects_s = [record.ended_s - record.arrival_s for record in result.records if record.ending is Ending.REJECTED]
    return Point(
        load=name,
        scale=scale,
        rate_rps=result.rate_rps,
        attainment=result.attainment,
        rejected=result.rejected,
        accept_autocorrelation=autocorrelation(accepts_per_s(result)),
        reject_s=max(rejects_s, default=0.0),
        told_late=sum(reject_s > TOLD_S for reject_s in rejects_s),
    )


def accepts_per_s(result: EmulationResult) -> list[float]:
    """Requests that were accepted, by the second in which they arrived, while requests arrived."""
    accepted = Counter(int(record.arrival_s) for record in result.records if record.ending is not Ending.REJECTED)
    return [float(accepted[second]) for second in range(int(result.records[-1].arrival_s))]


def autocorrelation(values: list[float], lag: int = 1) -> float:
    """Of values with those `lag` places later: 1 for a slow drift, -1 for up and down by turns; 0.0 for a constant."""
    if len(values) <= lag + 1:
        return 0.0
    mean = statistics.fmean(values)
    spread = sum((value - mean) ** 2 for value in values)
    together = sum((early - mean) * (late - mean) for early, late in zip(values, values[lag:], strict=False))
    return together / spread if spread else 0.0


def goodput_scale(job: tuple[str, int]) -> float:
    """The rate scale at which a load has its goodput."""
    name, limit = job
    trace = load_of(name, limit)
    return (
        find_goodput(spec_of(name), trace, tolerance=0.04, start_rps=START_RPS[name], min_span_s=SPAN_S).rps
        / trace.rate_rps
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=4000, help="requests of each load")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--write", metavar="SECTION", help="put the table into docs/performance.md")
    arguments = parser.parse_args()
    if not TRACES.exists():
        sys.exit(f"{TRACES} is not there: these traces are not part of the repository")
    with ProcessPoolExecutor(arguments.processes, max_tasks_per_child=1) as pool:
        peaks = list(pool.map(goodput_scale, [(name, arguments.limit) for name in LOADS]))
        jobs = [
            (name, arguments.limit, peak * scale, scale)
            for name, peak in zip(LOADS, peaks, strict=True)
            for scale in SCALES
        ]
        points = list(pool.map(measure, jobs))
    text = stamp("emulated: 4 H200") + "\n\n" + report(points)
    print(text)
    if arguments.write:
        write_section(arguments.write, text)


def report(points: list[Point]) -> str:
    best = {name: max(point.met_rps for point in points if point.load == name) for name in {p.load for p in points}}
    rows = [
        [
            point.load,
            f"{point.scale:g}",
            f"{point.rate_rps:.1f}",
            f"{point.attainment:.3f}",
            f"{point.met_rps:.1f}",
            f"{point.met_rps / best[point.load]:.2f}",
            str(point.rejected),
            f"{point.accept_autocorrelation:.2f}",
            f"{point.reject_s * 1e3:.1f}",
            str(point.told_late),
        ]
        for point in points
    ]
    heads = ["load", "rate / goodput", "req/s", "attainment", "met, req/s", "met / best", "rejected"]
    return table([*heads, "lag-1 autocorrelation of accepts", "slowest reject, ms", "told after 50 ms"], rows)


if __name__ == "__main__":
    main()
