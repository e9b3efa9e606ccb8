"""GPU kernels beside their peers and the device's limits. Needs torch, triton and a GPU; neither Ray nor gRPC.

    python -m bench.kernels [--tune] [--only decode] [--write]

Every case's peers run in the same process, one after the other, each with a cold L2 cache. `--tune` measures every tile
size first and saves the best to kernels/gpu/tuned. `--smoke` runs everything small, on whatever device there is (with
TRITON_INTERPRET=1 where it is a CPU), and measures nothing of worth.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from bench.ceilings import Ceilings, describe, measure_ceilings, seconds_of
from bench.kernel_case import Case, Sizes, Work, smoke_sizes
from bench.kernel_cases import cases
from bench.report import stamp, table, write_section
from kernels.gpu import tuning

HEADS = (
    "kernel",
    "µs",
    "GB/s",
    "of copy",
    "TFLOP/s",
    "of matmul",
    "fastest peer, µs",
    "peer / ours",
    "other peers, µs",
)
# What a kernel or a backend raises that cannot do what it is asked: compilers are no more particular.
CANNOT = (RuntimeError, AssertionError, TypeError, ValueError, CompilationError, OutOfResources)
PUBLISHED = (
    "FlashAttention-3, as published and measured elsewhere: decode at batch 64 and context 2,047 takes 140 µs, prefill "
    "of 8 x 4,096 tokens 2,000 µs."
)


class Arguments(argparse.Namespace):
    tune: bool
    only: str
    smoke: bool
    write: bool


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds; None for what could not run."""

    case: Case
    ours: float | None
    peers: dict[str, float | None]


def measure(case: Case, device: torch.device, rounds: int) -> Measured:
    ours, *theirs = (
        _seconds(f"{case.name}, {name}", work, device, rounds)
        for name, work in (("ours", case.ours), *case.peers.items())
    )
    return Measured(case, ours, dict(zip(case.peers, theirs, strict=True)))


def line(measured: Measured, ceilings: Ceilings) -> list[str]:
    """One line of the table."""
    case, ours = measured.case, measured.ours
    ran = sorted((seconds, name) for name, seconds in measured.peers.items() if seconds is not None)
    others = [f"{name} {seconds * 1e6:,.0f}" for seconds, name in ran[1:]]
    others += [f"{name} –" for name, seconds in measured.peers.items() if seconds is None]
    best = f"{ran[0][1]} {ran[0][0] * 1e6:,.0f}" if ran else ""
    if ours is None:
        return [case.name, "failed", "", "", "", "", best, "", ", ".join(others)]
    bandwidth, rate = case.moved / ours, case.flops / ours
    return [
        case.name,
        f"{ours * 1e6:,.1f}",
        f"{bandwidth / 1e9:,.0f}",
        f"{bandwidth / ceilings.copy_bytes_per_s:.0%}",
        f"{rate / 1e12:,.1f}" if case.flops else "",
        f"{rate / ceilings.matmul_flops:.0%}" if case.flops else "",
        best,
        f"{ran[0][0] / ours:.2f}" if ran else "",
        ", ".join(others),
    ]


def report(lines: Sequence[Sequence[str]], ceilings: Ceilings, device: torch.device) -> str:
    limits = (
        f"Limits in the same run: copy {ceilings.copy_bytes_per_s / 1e12:.2f} TB/s (read and written), read "
        f"{ceilings.read_bytes_per_s / 1e12:.2f} TB/s, matrix product {ceilings.matmul_flops / 1e12:,.0f} TFLOP/s. "
        "A dash: the peer does not take these shapes."
    )
    return f"{stamp(describe(device))}\n\n{table(HEADS, lines)}\n\n{limits} {PUBLISHED}"


def parse(argv: Sequence[str] | None = None) -> Arguments:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="measure tile sizes that no file has yet, and save them")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to see that everything runs")
    parser.add_argument("--write", action="store_true", help="replace the table in docs/performance.md")
    arguments = parser.parse_args(argv, namespace=Arguments())
    if not torch.cuda.is_available() and not (arguments.smoke and os.environ.get("TRITON_INTERPRET") == "1"):
        parser.error("no CUDA device (--smoke with TRITON_INTERPRET=1 does without)")
    return arguments


def main() -> None:
    """Exits with status 1 when a kernel of ours could not run."""
    arguments = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = smoke_sizes(device) if arguments.smoke else Sizes(device)
    ceilings = Ceilings(1.0, 1.0, 1.0) if arguments.smoke else measure_ceilings(device, sizes.dtype)
    if arguments.tune:
        tuning.enable()
    lines: list[list[str]] = []
    began = time.monotonic()
    for case in cases(sizes):
        if arguments.only in case.name:
            lines.append(line(measure(case, device, rounds=1 if arguments.smoke else 20), ceilings))
            print(f"{time.monotonic() - began:5.0f} s  {'  '.join(lines[-1])}", file=sys.stderr, flush=True)
            if arguments.write:
                # Again after each: a run that is cut short has not been for nothing.
                write_section("gpu-kernels", report(lines, ceilings, device))
    print(report(lines, ceilings, device))
    if any("failed" in cells for cells in lines):
        raise SystemExit(1)


def _seconds(name: str, work: Work, device: torch.device, rounds: int) -> float | None:
    try:
        return seconds_of(work, device, rounds, warm_up=min(2, rounds - 1))
    except CANNOT as error:
        print(f"{name} does not run: {(str(error).splitlines() or [repr(error)])[0]}", file=sys.stderr, flush=True)
        return None


if __name__ == "__main__":
    main()
