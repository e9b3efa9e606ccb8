"""`tandem emulate`: replays a trace against a cluster on paper, and prints what its clients would see."""

from __future__ import annotations

import json
import random
from typing import cast, get_args

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cluster.controller_config import ControllerConfig
from cluster.gateway_config import require_policy
from cluster.planning.arrivals import ArrivalKind, arrivals
from cluster.planning.emulation_result import EmulationResult
from cluster.planning.emulation_spec import EmulationSpec
from cluster.planning.emulator import emulate
from cluster.planning.goodput import Goodput, find_goodput
from cluster.planning.options import EmulateOptions
from cluster.planning.trace import Trace, read_trace
from engine.errors import ConfigError
from engine.objectives import Objectives


def run(options: EmulateOptions) -> None:
    """Prints one JSON object, or a table. Raises ConfigError naming the flag or the trace's line."""
    _check(options)
    trace = _trace(options)
    spec = EmulationSpec(
        profile=options.profile,
        model=options.model,
        prefill=options.prefill,
        decode=options.decode,
        colocated=options.colocated,
        tp_prefill=options.tp_prefill,
        tp_decode=options.tp_decode,
        router=options.router,
        objectives=Objectives(options.ttft_ms / 1e3, options.tpot_ms / 1e3),
        seed=options.seed,
        controller=ControllerConfig(enabled=True) if options.controller else None,
    )
    found = find_goodput(spec, trace, processes=options.processes) if options.find_goodput else None
    result = emulate(spec, trace) if found is None else found.result
    if options.as_json:
        print(json.dumps(result.as_json(None if found is None else found.rps_per_gpu)))
    else:
        _print_tables(result, found)


def _check(options: EmulateOptions) -> None:
    for flag, value in (
        ("--prefill", options.prefill),
        ("--decode", options.decode),
        ("--colocated", options.colocated),
    ):
        if value < 0:
            raise ConfigError(f"{flag}: got {value}, expected 0 or more workers")
    if options.decode + options.colocated == 0:
        raise ConfigError("--decode: got 0, expected at least 1 worker, or --colocated workers")
    if options.prefill + options.colocated == 0:
        raise ConfigError("--prefill: got 0, expected at least 1 worker, or --colocated workers")
    positive: list[tuple[str, float | None]] = [
        ("--ttft-ms", options.ttft_ms),
        ("--tpot-ms", options.tpot_ms),
        ("--rate-scale", options.rate_scale),
        ("--rate", options.rate),
        ("--limit", options.limit),
        ("--tp-prefill", options.tp_prefill),
        ("--tp-decode", options.tp_decode),
        ("--processes", options.processes),
    ]
    for flag, number in positive:
        if number is not None and not 0 < number < float("inf"):
            raise ConfigError(f"{flag}: got {number}, expected a positive number")
    require_policy(options.router, "--router")
    if options.arrivals is not None and options.arrivals not in get_args(ArrivalKind):
        raise ConfigError(f"--arrivals: got {options.arrivals!r}, expected {' or '.join(get_args(ArrivalKind))}")
    if (options.arrivals is None) != (options.rate is None):
        raise ConfigError("--arrivals and --rate go together: a process, and its requests per second")


def _trace(options: EmulateOptions) -> Trace:
    trace = read_trace(options.trace, options.limit)
    if options.rate is not None and options.arrivals is not None:
        kind = cast(ArrivalKind, options.arrivals)
        # A generator of its own: the cluster's draws do not depend on how many requests there are.
        rng = random.Random(f"arrivals {options.seed}")
        trace = trace.arriving(arrivals(options.rate, len(trace), kind, options.cv, rng))
    elif not trace.has_arrivals:
        raise ConfigError(f"--trace {options.trace}: has lengths only, expected --arrivals and --rate with it")
    if options.spread:
        trace = trace.spread()
    return trace.scaled(options.rate_scale)


def _print_tables(result: EmulationResult, found: Goodput | None) -> None:
    console = Console(highlight=False)
    console.print(summary_table(result, found))
    if result.endings.keys() != {"done"}:
        console.print(endings_table(result))
    if found is not None:
        console.print(probes_table(found))


def summary_table(result: EmulationResult, found: Goodput | None) -> Table:
    table = Table(title=f"{result.offered} requests, {result.gpus} GPUs", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("what")
    table.add_column("", justify="right")
    rows: list[tuple[str, str]] = [
        ("rate", f"{result.rate_rps:.3f} req/s"),
        ("attainment, both", f"{result.attainment:.1%}"),
        ("attainment, TTFT", f"{result.attainment_ttft:.1%}"),
        ("attainment, TPOT", f"{result.attainment_tpot:.1%}"),
        ("rejected", str(result.rejected)),
        ("TTFT p50 / p90 / p99", _shown(result.ttft_ms())),
        ("TPOT p50 / p90 / p99", _shown(result.tpot_ms())),
    ]
    if found is not None:
        rows.append(("goodput per GPU", f"{found.rps_per_gpu:.3f} req/s"))
    rows.append(("emulated", f"{result.virtual_s:.1f} s in {result.wall_s:.1f} s, {result.events} events"))
    for row in rows:
        table.add_row(*row)
    return table


def endings_table(result: EmulationResult) -> Table:
    table = Table(title="How they ended", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("ending")
    table.add_column("requests", justify="right")
    for ending, count in result.endings.most_common():
        table.add_row(ending, str(count))
    return table


def probes_table(found: Goodput) -> Table:
    table = Table(title="Rates tried", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("req/s", "attainment", ""):
        table.add_column(heading, justify="right")
    for probe in found.probes:
        table.add_row(f"{probe.rate_rps:.3f}", f"{probe.attainment:.1%}", "met" if probe.is_attained else "")
    return table


def _shown(percentiles: dict[str, float | None]) -> str:
    values = [value for value in percentiles.values() if value is not None]
    return " / ".join(f"{value:.1f}" for value in values) + " ms" if values else "-"
