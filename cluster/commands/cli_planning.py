"""`tandem emulate` and `tandem plan` on the command line: what their flags are called and mean."""

from __future__ import annotations

from collections.abc import Callable

from typer import Option

from cluster.commands.flags import command_of
from cluster.planning.options import EmulateOptions, PlanOptions

JSON = Option("--json", help="Print one JSON object.")
PROFILE = Option("--profile", metavar="P", help="a100-80g, h100, h200, l40s, l4, cpu, or a file of `tandem profile`.")
MODEL = Option("--model", metavar="M", help="llama-3.1-8b, llama-3.1-70b, qwen3-8b, opt-13b, …, or a config.json.")
TTFT = Option("--ttft-ms", metavar="X", help="Objective: time to the first token.")
TPOT = Option("--tpot-ms", metavar="Y", help="Objective: mean time of each token after it.")
TRACE = Option("--trace", metavar="F.jsonl", help="Requests: arrivals and lengths, one a line.")
LIMIT = Option("--limit", metavar="N", help="Only the trace's first N requests.")
SEED = Option("--seed", metavar="S", help="Decides everything random.")
PROCESSES = Option("--processes", metavar="N", help="Emulations at a time, where several are needed.")
ROUTER = Option("--router", metavar="NAME", help="goodput, round_robin, random, least_loaded, …")
SPREAD = Option("--spread/--burst", help="Requests of one moment: spread over 3 s, or all at once.")

EMULATE = {
    "trace": TRACE,
    "profile": PROFILE,
    "model": MODEL,
    "ttft_ms": TTFT,
    "tpot_ms": TPOT,
    "prefill": Option("--prefill", metavar="N", help="Prefill workers."),
    "decode": Option("--decode", metavar="N", help="Decode workers."),
    "colocated": Option("--colocated", metavar="N", help="Workers that do both, with chunked prefill."),
    "tp_prefill": Option("--tp-prefill", metavar="K", help="GPUs of one prefill worker."),
    "tp_decode": Option("--tp-decode", metavar="K", help="GPUs of one decode or colocated worker."),
    "router": ROUTER,
    "limit": LIMIT,
    "rate_scale": Option("--rate-scale", metavar="S", help="Requests come S times as fast as in the trace."),
    "spread": SPREAD,
    "arrivals": Option("--arrivals", metavar="A", help="poisson, gamma or fixed, in place of the trace's arrivals."),
    "rate": Option("--rate", metavar="R", help="Requests per second of --arrivals."),
    "cv": Option("--cv", metavar="C", help="Of gamma arrivals: deviation over mean of the gaps."),
    "controller": Option("--controller", help="Let the controller flip roles."),
    "find_goodput": Option("--find-goodput", help="Search the highest rate at which 90 % meet both objectives."),
    "seed": SEED,
    "processes": PROCESSES,
    "as_json": JSON,
}


PLAN = {
    "profile": PROFILE,
    "model": MODEL,
    "gpus": Option("--gpus", metavar="N", help="GPUs in all."),
    "gpus_per_node": Option("--gpus-per-node", metavar="K", help="GPUs that share fast links."),
    "trace": TRACE,
    "ttft_ms": TTFT,
    "tpot_ms": TPOT,
    "affinity": Option("--affinity", metavar="high|low", help="Links between nodes; none: by the profile's rates."),
    "out": Option("--out", metavar="F.yaml", help="The configuration; table, numbers and picture go beside it."),
    "limit": LIMIT,
    "spread": SPREAD,
    "seed": SEED,
    "router": ROUTER,
    "requests": Option("--requests", metavar="N", help="Requests of one judgement."),
    "keep": Option("--keep", metavar="N", help="Best arrangements of each kind that are judged as a whole."),
    "processes": PROCESSES,
    "time_budget_s": Option("--time-budget-s", metavar="S", help="No new judgement is begun after this."),
    "as_json": JSON,
}


def emulate_command() -> Callable[..., None]:
    """`tandem emulate`, for Typer."""

    def emulate(options: EmulateOptions) -> None:
        """Replays a trace against a cluster on paper, in virtual time: the production code on a cost model."""
        from cluster.commands.emulate import run

        run(options)

    return command_of(EmulateOptions, EMULATE, emulate)


def plan_command() -> Callable[..., None]:
    """`tandem plan`, for Typer."""

    def plan(options: PlanOptions) -> None:
        """Finds the arrangement of so many GPUs that carries most requests within their objectives."""
        from cluster.commands.plan import run

        run(options)

    return command_of(PlanOptions, PLAN, plan)
