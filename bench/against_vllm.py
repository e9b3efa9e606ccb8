"""Goodput beside vLLM's on the same two cores: same model, same Poisson requests, servers taking turns.

    python -m bench.against_vllm --vllm-python PYTHON --hf-folder FOLDER --config TANDEM.yaml [--serve-vllm SCRIPT]
        [--rates 0.6,0.8,…] [--slo 1500,90 --slo 2500,60 --slo 3000,200] [--n 150] [--seeds 3]
        --out FOLDER [--write NAME]

Three arms: vLLM colocated on both cores, vLLM with one prefill and one decode instance over NIXL (as ../shared/peers
starts it, its two defects on small machines cured), and `tandem serve --config`, one configuration for all objectives.
Idle vLLM instances spin, so only one server is alive at a time: each is started, given all its rates, and stopped;
then comes the next, and then the next seed. vLLM knows nothing of objectives: one run of a rate is judged by every
pair. Tandem is told them, and is run for each pair. All is counted at the client, whose work falls on the same cores
for all. Prompts are common words, about as many as --input-tokens, none sent twice; answers have exactly
--output-tokens.

FOLDER gets runs.jsonl (a study that was interrupted goes on from it), results.json and report.md. Compare only on a
machine that does nothing else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench.engine_processes import ROOT
from bench.report import table
from bench.servers import running, tandem_server, vllm_server
from bench.turns import Arm, Store, Turns
from bench.turns_report import (
    attainment_table,
    best_rate,
    best_table,
    latency_table,
    pairs_of,
    points_of,
    publish,
    split_values,
    unloaded_table,
    unloaded_values,
)
from cluster.loadtest.load import Load, Process
from cluster.loadtest.openai_target import OpenAITarget
from cluster.loadtest.prompts import RandomWords
from cluster.loadtest.results import describe
from cluster.loadtest.tandem_target import TandemTarget
from cluster.planning.trace import TraceRequest
from engine.objectives import NO_OBJECTIVES, Objectives

SERVE_VLLM = ROOT.parent / "shared" / "peers" / "serve_vllm.py"
PAIRS = ("1500,90", "2500,60", "3000,200")
RATES = "0.6,0.8,1,1.2,1.4,1.6,1.8,2,2.4,2.8,3.2"
# Text may be empty while a character is incomplete; a token has come all the same, as with Tandem.
VLLM_BODY = {"return_token_ids": True}
TANDEM, TOGETHER, APART = "Tandem", "vLLM colocated", "vLLM 1P+1D"
GOAL = 1.3
ITL_GOAL = 2.0


class Arguments(argparse.Namespace):
    vllm_python: str
    serve_vllm: Path
    hf_folder: str
    config: Path
    rates: str
    rates_of: list[str] | None
    stop_below: float
    slo: list[str] | None
    n: int
    seeds: int
    input_tokens: int
    output_tokens: int
    port: int
    pd_extra: str
    out: Path
    write: str


def arms_of(arguments: Arguments) -> list[Arm]:
    """vLLM twice, then ours."""
    python, script, model = arguments.vllm_python, arguments.serve_vllm, arguments.hf_folder
    together = vllm_server(python, script, "co", model, arguments.port)
    apart = vllm_server(python, script, "pd", model, arguments.port + 100, arguments.pd_extra.split())
    ours = tandem_server(arguments.config.resolve())
    return [
        Arm(
            TOGETHER,
            partial(running, together),
            lambda url: OpenAITarget("co", url, extra_body=VLLM_BODY),
            acts=False,
            rates_rps=rates_of(arguments, TOGETHER),
        ),
        Arm(
            APART,
            partial(running, apart),
            lambda url: OpenAITarget("pd", url, extra_body=VLLM_BODY),
            acts=False,
            rates_rps=rates_of(arguments, APART),
        ),
        Arm(
            TANDEM,
            partial(running, ours),
            lambda address: TandemTarget("tandem", address),
            acts=True,
            rates_rps=rates_of(arguments, TANDEM),
        ),
    ]


def rates_of(arguments: Arguments, arm: str) -> dict[Objectives, list[float]]:
    """What --rates-of says of an arm, by the objectives that it is told."""
    found = {}
    for text in arguments.rates_of or []:
        name, _, rates = text.partition("=")
        name, _, pair = name.partition("@")
        if name == arm:
            told = pairs_of([pair])[0] if pair else NO_OBJECTIVES
            found[told] = [float(rate) for rate in rates.split(",")]
    return found


def turns_of(arguments: Arguments, arms: Sequence[Arm]) -> Turns:
    row = TraceRequest(None, arguments.input_tokens, arguments.output_tokens)
    return Turns(
        arms,
        pairs_of(arguments.slo or PAIRS),
        [float(rate) for rate in arguments.rates.split(",")],
        range(arguments.seeds),
        Load((row,) * arguments.n, Process(arguments.n)),
        lambda run: RandomWords(),
        stop_below=arguments.stop_below,
    )


def page(turns: Turns, store: Store) -> str:
    """All tables, with the ratios that are asked for first."""
    parts = [ratio_table(turns, store), best_table(turns, store), unloaded_table(turns, store)]
    for pair in turns.pairs:
        parts += [f"Attainment at {describe(pair)} (by seed):", attainment_table(turns, store, pair)]
        parts += ["Latencies (ms) of each arm at its best rate:", latency_table(turns, store, pair)]
    return "\n\n".join(parts)


def ratio_table(turns: Turns, store: Store) -> str:
    """Tandem against vLLM's better arm, and the gaps between tokens of the requests that it disaggregated."""
    *peers, ours = turns.arms
    unloaded_ms = unloaded_values(store, ours)["tpot_ms"]
    rows = []
    for pair in turns.pairs:
        best = best_rate(turns, store, ours, pair)
        peer = max(best_rate(turns, store, arm, pair) for arm in peers)
        point = next((p for p in points_of(turns, store, ours, pair) if p.rate_rps == best), None)
        gap_ms = None if point is None else split_values(point)["split_itl_p99_ms"]
        rows.append(
            [
                describe(pair),
                f"{best:g}",
                f"{peer:g}",
                f"{best / peer:.2f}" if peer else "–",
                "nothing was split" if gap_ms is None else f"{gap_ms:.0f} ms",
                f"{gap_ms / unloaded_ms:.2f}" if gap_ms is not None and unloaded_ms else "–",
            ]
        )
    heads = [
        "objectives",
        f"{ours.name} req/s",
        "vLLM's better arm",
        f"ratio (≥ {GOAL:g})",
        "ITL p99 when split",
        f"to unloaded TPOT (≤ {ITL_GOAL:g})",
    ]
    return table(heads, rows)


def parse(argv: Sequence[str]) -> Arguments:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", required=True, help="the Python of an environment with vLLM")
    parser.add_argument("--serve-vllm", type=Path, default=SERVE_VLLM)
    parser.add_argument("--hf-folder", required=True, help="the model as a Hugging Face folder")
    parser.add_argument("--config", type=Path, required=True, help="the same model, float32, for tandem serve")
    parser.add_argument("--rates", default=RATES)
    parser.add_argument(
        "--rates-of",
        action="append",
        metavar="ARM[@TTFT_MS,TPOT_MS]=R,R,…",
        help="an arm's own rates, Tandem's under one pair of objectives",
    )
    parser.add_argument("--stop-below", type=float, default=0.6, help="attainment that ends an arm's rates")
    parser.add_argument("--slo", action="append", metavar="TTFT_MS,TPOT_MS")
    parser.add_argument("--n", type=int, default=150, help="requests of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--input-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--pd-extra", default="", help="more flags of serve_vllm.py pd")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--write", default="", help="section of docs/performance.md to replace")
    return parser.parse_args(argv, namespace=Arguments())


def main() -> None:
    """Prints the tables."""
    arguments = parse(sys.argv[1:])
    if not arguments.serve_vllm.exists():
        raise SystemExit(f"--serve-vllm {arguments.serve_vllm.name}: is not there")
    publish(turns_of(arguments, arms_of(arguments)), arguments.out, page, arguments.write)


if __name__ == "__main__":
    main()
