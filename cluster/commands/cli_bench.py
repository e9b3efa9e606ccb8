"""`tandem bench` on the command line: what its flags are called and mean."""

from __future__ import annotations

from collections.abc import Callable

from typer import Option

from cluster.commands.flags import command_of
from cluster.commands.running import run
from cluster.loadtest.options import BenchOptions

FLAGS = {
    "url": Option("--url", metavar="U", help="A Tandem (HOST:PORT) or any OpenAI-compatible server (http://…/v1)."),
    "target": Option("--target", metavar="NAME=U", help="Instead of --url, repeatable: these take turns."),
    "trace": Option("--trace", metavar="F.jsonl", help="Arrivals and lengths, one request a line."),
    "spread": Option("--spread/--burst", help="A trace's requests of one moment: spread out, or all at once."),
    "rate": Option("--rate", metavar="R", help="Requests per second."),
    "rates": Option("--rates", metavar="R,R,…", help="Runs at these rates, one after another."),
    "arrivals": Option("--arrivals", help="How the requests of a --rate come."),
    "cv": Option("--cv", metavar="C", help="Of gamma arrivals: deviation over mean of the gaps."),
    "requests": Option("--requests", metavar="N", help="Requests of a run."),
    "seed": Option("--seed", metavar="S", help="Decides arrivals and made-up prompts."),
    "seeds": Option("--seeds", metavar="N", help="Runs of each rate, pooled."),
    "prompts": Option("--prompts", metavar="F.jsonl", help="Real prompts; without them they are made up."),
    "prompt_form": Option("--prompt-form", help="How made-up prompts are sent."),
    "input_tokens": Option("--input-tokens", metavar="N", help="Length of a made-up prompt."),
    "output_tokens": Option("--output-tokens", metavar="N", help="Length of every answer."),
    "ignore_eos": Option("--ignore-eos/--stop-at-eos", help="Answers of exactly that length, or as they end."),
    "temperature": Option("--temperature", metavar="T", help="0: greedy."),
    "model": Option("--model", metavar="M", help="Which of a server's models."),
    "api_key_file": Option("--api-key-file", metavar="F", help="Key or token for Tandems; else TANDEM_API_KEY."),
    "ca": Option("--ca", metavar="F", help="Who signs the certificates of Tandems, in PEM: connects by TLS."),
    "header": Option("--header", metavar="NAME=VALUE", help="Sent with each HTTP request; repeatable."),
    "extra_body": Option("--extra-body", metavar="JSON", help="Further fields of each OpenAI request."),
    "ttft_ms": Option("--ttft-ms", metavar="X", help="Objective: time to the first token."),
    "tpot_ms": Option("--tpot-ms", metavar="Y", help="Objective: mean time of each token after it."),
    "send_objectives": Option("--send-objectives/--keep-objectives", help="Whether a Tandem is told of them."),
    "find_goodput": Option("--find-goodput", help="Search the highest rate at which enough requests meet both."),
    "attainment": Option("--attainment", metavar="A", help="How many are enough, as a share."),
    "tolerance": Option("--tolerance", metavar="T", help="How close the search comes, as a share of the rate."),
    "max_probes": Option("--max-probes", metavar="N", help="Most rates that the search tries."),
    "slo_scales": Option("--slo-scales", metavar="S,S,…", help="Judge also by the objectives times these."),
    "timeout_s": Option("--timeout-s", metavar="S", help="A request that takes longer has missed."),
    "pause_s": Option("--pause-s", metavar="S", help="Between two runs."),
    "warm_up": Option("--warm-up", metavar="N", help="Requests before the first run."),
    "reslo": Option("--reslo", metavar="F.json", help="No load: judge saved results by other objectives."),
    "out": Option("--out", metavar="DIR", help="Where results.json, report.md and the plots go."),
    "as_json": Option("--json", help="Print one JSON object."),
}


def bench_command() -> Callable[..., None]:
    """`tandem bench`, for Typer."""

    def bench(options: BenchOptions) -> None:
        """Sends load to running services, open loop, and says which share of it met its objectives."""
        from cluster.commands.bench import bench as measure

        run(measure(options))

    return command_of(BenchOptions, FLAGS, bench)
