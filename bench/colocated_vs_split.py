"""One prefill and one decode worker against two colocated ones: same engine, same cores, real model, real prompts.

    python -m bench.colocated_vs_split [--model M] [--rates 0.5,1,…] [--slo 1500,90 …] [--prompts F.jsonl …] [--n 60]
        [--seeds 2] [--own OWN.yaml] --out FOLDER [--write NAME]

Three arms, one alive at a time, in turns (bench/turns.py): `split`, whose router sends every prompt to the prefill
worker; `colocated`, where each worker computes the prompts of what it decodes, in chunks between its decode steps; and
`own`, where the router decides for each request, by --own or with workers for both ways. The first two refuse nobody
and know no objectives, so one run of a rate is judged by every pair of objectives: where the better arm changes is the
crossover. `own` is told the objectives, and is run for each pair. Each worker computes on one thread; the client
shares the cores with all arms alike. FOLDER gets runs.jsonl (an interrupted study goes on from it), results.json,
report.md and the configurations.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.engine_processes import ROOT
from bench.report import table
from bench.servers import running, tandem_server
from bench.turns import Arm, Store, Turns
from bench.turns_report import attainment_table, best_rate, latency_table, pairs_of, points_of, publish, unloaded_table
from cluster.loadtest.load import Load, Process
from cluster.loadtest.prompts import FilePrompts, PromptSource, RandomWords
from cluster.loadtest.results import describe
from cluster.loadtest.tandem_target import TandemTarget
from cluster.loadtest.target import Target
from cluster.planning.trace import TraceRequest
from cluster.prompt_file import PromptLine, read_prompt_file
from engine.config import DEFAULT_MODEL
from engine.errors import ConfigError

PROMPTS = ROOT.parent / "shared" / "data" / "prompts"
PROMPT_FILES = ("humaneval.jsonl", "mt_bench.jsonl", "gsm8k_test.jsonl")
RATES = "0.5,1,1.5,2,2.5,3,4"
PAIRS = ("300,200", "500,100", "1000,60", "1500,90", "2500,60", "3000,200", "5000,45")
CLUSTERS: Mapping[str, Mapping[str, int]] = {
    "split": {"prefill": 1, "decode": 1},
    "colocated": {"prefill": 0, "decode": 0, "colocated": 2},
    # Two places to compute a prompt beside the decoding, and one apart.
    "own": {"prefill": 1, "decode": 2},
}
# A policy that refuses nobody and prefers no way.
FIXED_POLICY = "least_loaded"
SLACK = 0.05


class Arguments(argparse.Namespace):
    model: str
    rates: str
    slo: list[str] | None
    prompts: list[Path] | None
    n: int
    seeds: int
    output_tokens: int
    own: Path | None
    out: Path
    write: str


def configurations(arguments: Arguments) -> dict[str, Path]:
    """Writes each arm's configuration into the folder; JSON is YAML."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    for name, cluster in CLUSTERS.items():
        if name == "own" and arguments.own is not None:
            paths[name] = arguments.own.resolve()
            continue
        config: dict[str, Any] = {
            "engine": {"model": arguments.model, "threads": 1},
            "gateway": {"router": {"policy": "goodput" if name == "own" else FIXED_POLICY}},
            "cluster": {**cluster, "address": "none"},
        }
        paths[name] = (arguments.out / f"{name}.yaml").resolve()
        paths[name].write_text(json.dumps(config) + "\n", encoding="utf-8")
    return paths


def arms_of(arguments: Arguments) -> list[Arm]:
    paths = configurations(arguments)
    return [
        Arm(name, partial(running, tandem_server(path)), _client(name), acts=name == "own")
        for name, path in paths.items()
    ]


def turns_of(arguments: Arguments, arms: Sequence[Arm]) -> Turns:
    return Turns(
        arms,
        pairs_of(arguments.slo or PAIRS),
        [float(rate) for rate in arguments.rates.split(",")],
        range(arguments.seeds),
        # The prompts are as long as they are; the 1 stands for a length that nobody reads.
        Load((TraceRequest(None, 1, arguments.output_tokens),) * arguments.n, Process(arguments.n)),
        prompts_of(arguments.prompts),
    )


def prompts_of(paths: Sequence[Path] | None) -> Callable[[str], PromptSource]:
    """Real ones; where nobody has named any and the usual ones are not there, words, with a line that says so."""
    chosen = paths or [path for name in PROMPT_FILES if (path := PROMPTS / name).exists()]
    if not chosen:
        print("no prompts at hand: made-up words instead of real prompts", file=sys.stderr)
        return lambda run: RandomWords()
    lines: list[PromptLine] = []
    for path in chosen:
        lines += read_prompt_file(path)
    return lambda run: FilePrompts(lines, random.Random(run), run)


def page(turns: Turns, store: Store) -> str:
    parts = [crossover_table(turns, store), unloaded_table(turns, store)]
    for pair in turns.pairs:
        parts += [f"Attainment at {describe(pair)} (by seed):", attainment_table(turns, store, pair)]
        parts += ["Latencies (ms) of each arm at its best rate:", latency_table(turns, store, pair)]
    return "\n\n".join(parts)


def crossover_table(turns: Turns, store: Store) -> str:
    """Which way is better for which objectives, and how the router's own choice compares."""
    rows = []
    for pair in turns.pairs:
        split, colocated, own = (best_rate(turns, store, arm, pair) for arm in turns.arms)
        better = "split" if split > colocated else "colocated" if colocated > split else "level"
        least = max(split, colocated) * (1 - SLACK)
        crossing = _crossing(turns, store, turns.pairs.index(pair))
        verdict = "–" if not least else "yes" if own >= least else "no"
        rows.append([describe(pair), f"{split:g}", f"{colocated:g}", better, crossing, f"{own:g}", verdict])
    heads = ["req/s with ≥ 90 %", "split", "colocated", "better", "crossover", "own choice", "within 5 %"]
    return table(heads, rows)


def _crossing(turns: Turns, store: Store, index: int) -> str:
    """The rates between which the arm with the higher attainment changes."""
    split, colocated, _ = turns.arms
    pair = turns.pairs[index]
    theirs = {point.rate_rps: point.attainment for point in points_of(turns, store, colocated, pair)}
    ahead = [
        (point.rate_rps, point.attainment > theirs[point.rate_rps])
        for point in points_of(turns, store, split, pair)
        if point.rate_rps in theirs and point.attainment != theirs[point.rate_rps]
    ]
    changes = [
        f"{before:g} to {after:g}" for (before, was), (after, is_now) in itertools.pairwise(ahead) if was != is_now
    ]
    return ", ".join(changes) or "none"


def _client(name: str) -> Callable[[str], Target]:
    return lambda address: TandemTarget(name, address, sends_objectives=name == "own")


def parse(argv: Sequence[str]) -> Arguments:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rates", default=RATES)
    parser.add_argument("--slo", action="append", metavar="TTFT_MS,TPOT_MS")
    parser.add_argument("--prompts", action="append", type=Path, metavar="F.jsonl")
    parser.add_argument("--n", type=int, default=60, help="requests of each run")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--own", type=Path, help="configuration of the arm whose router decides")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--write", default="", help="section of docs/performance.md to replace")
    return parser.parse_args(argv, namespace=Arguments())


def main() -> None:
    """Prints the tables."""
    arguments = parse(sys.argv[1:])
    try:
        turns = turns_of(arguments, arms_of(arguments))
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    publish(turns, arguments.out, page, arguments.write)


if __name__ == "__main__":
    main()
