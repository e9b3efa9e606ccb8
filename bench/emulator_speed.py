"""How fast the emulator is: a recorded half hour on 64 workers, and what an event costs as the cluster grows.

    python -m bench.emulator_speed                    both tables, in Markdown
    python -m bench.emulator_speed --workers 16 64    only these sizes, and not the half hour

An event is a callback that the virtual loop ran. As the cluster grows the load grows with it: the trace is replayed as
many times faster, over as many requests, so that every worker has the same to do.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.report import table
from bench.trace_objectives import TRACE_OBJECTIVES
from cluster.planning.emulation_result import EmulationResult
from cluster.planning.emulation_spec import EmulationSpec
from cluster.planning.emulator import emulate
from cluster.planning.trace import Trace, read_trace
from engine.errors import ConfigError

TRACES = Path(__file__).parents[2] / "shared" / "data" / "traces"
TRACE = "azure2023_conv"
WORKERS = 64
SIZES = (16, 64, 256, 1024)
# Requests per worker, and the load of each, in the second table.
REQUESTS_PER_WORKER = 12
RPS_PER_WORKER = 1.0


def spec_of(workers: int, block_size: int, router: str) -> EmulationSpec:
    return EmulationSpec(
        profile="h200",
        model="llama-3.1-8b",
        prefill=workers // 2,
        decode=workers - workers // 2,
        router=router,
        objectives=TRACE_OBJECTIVES[TRACE],
        block_size=block_size,
    )


def grown(trace: Trace, workers: int) -> Trace:
    """The same load for each of so many workers."""
    count = REQUESTS_PER_WORKER * workers
    repeated = trace.repeated(-(-count // len(trace))).head(count)
    return repeated.scaled(RPS_PER_WORKER * workers / repeated.rate_rps)


@dataclass(frozen=True, slots=True)
class Timed:
    """A run, and the seconds that the processor worked for it: others on the machine do not count."""

    result: EmulationResult
    cpu_s: float

    @property
    def event_s(self) -> float:
        return self.cpu_s / self.result.events

    def cells(self) -> list[str]:
        result = self.result
        return [
            str(result.offered),
            f"{result.virtual_s:.1f}",
            f"{result.wall_s:.1f}",
            f"{self.cpu_s:.1f}",
            str(result.events),
            f"{self.event_s * 1e6:.1f}",
            f"{result.attainment:.1%}",
        ]


HEADS = ("workers", "requests", "virtual s", "wall s", "CPU s", "events", "CPU µs/event", "attainment")


def timed(spec: EmulationSpec, trace: Trace) -> Timed:
    began_s = time.process_time()
    result = emulate(spec, trace)
    return Timed(result, time.process_time() - began_s)


def half_hour(trace: Trace, block_size: int, router: str) -> str:
    run = timed(spec_of(WORKERS, block_size, router), trace)
    return table(HEADS, [[str(WORKERS), *run.cells()]])


def growth(trace: Trace, sizes: Sequence[int], block_size: int, router: str) -> str:
    rows: list[list[str]] = []
    smallest_s = 0.0
    for workers in sizes:
        run = timed(spec_of(workers, block_size, router), grown(trace, workers))
        smallest_s = smallest_s or run.event_s
        rows.append([str(workers), *run.cells(), f"{run.event_s / smallest_s:.2f}"])
    return table([*HEADS, "against the first"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, default=TRACES / f"{TRACE}.jsonl")
    parser.add_argument("--workers", type=int, nargs="*", help="sizes of the second table; leaves out the first")
    parser.add_argument("--block-size", type=int, default=16, help="token slots in a KV block")
    parser.add_argument("--router", default="goodput")
    options = parser.parse_args()
    if not options.trace.exists():
        raise SystemExit(f"--trace {options.trace}: no such file")
    try:
        trace = read_trace(options.trace)
        print(
            f"{TRACE}, {platform.machine()}, Python {platform.python_version()}, one core of {os.cpu_count()}; ", end=""
        )
        print(f"router {options.router}, blocks of {options.block_size} tokens\n")
        if options.workers is None:
            print(half_hour(trace, options.block_size, options.router), end="\n\n", flush=True)
        print(growth(trace, options.workers or SIZES, options.block_size, options.router))
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    print(f"\nmost memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
