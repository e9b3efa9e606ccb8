"""The command line: `tandem serve | generate | status | top | bench | plan | emulate | chaos | keys | worker | …`.

Exit codes: 0 done; 2 a usage error or anything of the TandemError tree, with one line on stderr; 130 after Ctrl-C.
What a command needs is imported inside it: torch, grpc and Ray take seconds, and `tandem --help` must not.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from cluster.client_access import read_access
from cluster.commands.cli_bench import bench_command
from cluster.commands.cli_chaos import chaos_command
from cluster.commands.cli_config import config_commands
from cluster.commands.cli_keys import keys_commands
from cluster.commands.cli_parts import gateway_command, health_command
from cluster.commands.cli_planning import emulate_command, plan_command
from cluster.commands.cli_top import top_command
from cluster.commands.running import Stopped, run
from cluster.environment import quiet_libraries, read_environment
from cluster.host_port import require_host_port, require_reachable
from cluster.logs.lines import TEXT, set_up_logs
from engine.errors import ConfigError, TandemError

ERROR_EXIT_CODE = 2
DEFAULT_URL = "127.0.0.1:50051"

app = typer.Typer(
    name="tandem",
    help="Serves large language models with prefill and decode on separate workers.",
    pretty_exceptions_enable=False,
)

ConfigOption = Annotated[Path | None, typer.Option("--config", metavar="F", help="YAML file with the configuration.")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="M", help="The default model's name, a GGUF file, a Hugging Face folder or hub id."
    ),
]
UrlOption = Annotated[str, typer.Option("--url", metavar="HOST:PORT", help="Where the service answers.")]
KeyOption = Annotated[
    Path | None,
    typer.Option("--api-key-file", metavar="F", help="The API key or token to call with; else TANDEM_API_KEY."),
]
CaOption = Annotated[
    Path | None,
    typer.Option("--ca", metavar="F", help="Certificates of who signs the service's own: connects by TLS."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
PrefillOption = Annotated[int | None, typer.Option("--prefill", metavar="N", help="Number of prefill workers.")]
DecodeOption = Annotated[int | None, typer.Option("--decode", metavar="N", help="Number of decode workers.")]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="ray|none|auto|HOST:PORT",
        help="A local Ray, plain processes, or an existing Ray cluster (auto: the one of this node).",
    ),
]


def _examples(*lines: str) -> str:
    """What stands below a command's flags: one paragraph each, so that none is wrapped into the next."""
    return "\n\n".join(["Examples:", *lines])


class WorkerRole(StrEnum):
    """Roles as the command line spells them."""

    PREFILL = "prefill"
    DECODE = "decode"


@app.callback(invoke_without_command=True)
def _tandem(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if show_version:
        print(f"tandem {version('tandem-serving')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command(
    epilog=_examples(
        "tandem serve",
        "tandem serve --address none --model path/to/model.gguf",
        "tandem serve --config tandem.yaml --decode 2",
        "tandem serve --address auto --config tandem.yaml",
    )
)
def serve(
    config: ConfigOption = None,
    model: ModelOption = None,
    prefill: PrefillOption = None,
    decode: DecodeOption = None,
    colocated: Annotated[
        int | None, typer.Option("--colocated", metavar="N", help="Number of workers that do both.")
    ] = None,
    router: Annotated[
        str | None, typer.Option("--router", metavar="NAME", help="goodput, round_robin, random, least_loaded, …")
    ] = None,
    address: AddressOption = None,
    grpc_port: Annotated[
        int | None, typer.Option("--grpc-port", metavar="P", help="The gateway's port; 0: any free one.")
    ] = None,
    http_port: Annotated[
        int | None, typer.Option("--http-port", metavar="P", help="The port of OpenAI's interface; 0: any free one.")
    ] = None,
) -> None:
    """Starts a service: gateway, prefill and decode workers. Runs until Ctrl-C or SIGTERM."""
    from cluster.config import load

    flags = {"--model": model, "--prefill": prefill, "--decode": decode, "--colocated": colocated, "--router": router}
    loaded = load(config, {**flags, "--address": address, "--grpc-port": grpc_port, "--http-port": http_port})

    from cluster.commands.serve import serve as keep_serving

    set_up_logs(loaded.logging)
    try:
        run(keep_serving(loaded))
    except Stopped:
        # A signal is how a service is meant to end.
        raise typer.Exit from None


@app.command(
    epilog=_examples(
        'tandem generate "What is the capital of France?" --chat',
        'tandem generate "Once upon a time" --temperature 0 --max-tokens 40 --json',
        "tandem generate --file prompts.jsonl --url 10.0.0.1:50051 --json",
        'tandem generate "Once upon a time" --local',
    )
)
def generate(
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="A prompt.", show_default=False)] = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="F.jsonl", help="Prompts, one JSON object a line.")
    ] = None,
    url: UrlOption = DEFAULT_URL,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", metavar="N", help="Longest answer.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", metavar="T", help="0: greedy.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="S", help="Decides all random draws.")] = None,
    as_json: JsonOption = False,
    chat: Annotated[bool, typer.Option("--chat", help="TEXT is a chat message, not the beginning of a text.")] = False,
    local: Annotated[bool, typer.Option("--local", help="No service: the single-process reference.")] = False,
    config: ConfigOption = None,
    model: ModelOption = None,
    api_key_file: KeyOption = None,
    ca: CaOption = None,
) -> None:
    """Answers a prompt, or a file of prompts sent all at once. --config and --model are for --local."""
    from cluster.commands.generate import generate as send_all
    from cluster.commands.generate import sampling_params
    from cluster.prompt_file import from_text, read_prompt_file

    require_host_port("--url", url)
    if (text is None) == (file is None):
        raise ConfigError(f"generate: got {'neither' if text is None else 'both'}, expected either TEXT or --file")
    if not local and (config is not None or model is not None):
        raise ConfigError("generate: --config and --model go with --local; a service has its own")
    if chat and text is None:
        raise ConfigError("generate: --chat goes with TEXT; in a file, use 'messages'")
    params = sampling_params(max_tokens, temperature, seed)
    lines = read_prompt_file(file) if file is not None else [from_text(text or "", is_chat=chat)]
    if not local:
        run(send_all(lines, url, params, access=read_access(api_key_file, ca, url), as_json=as_json))
        return

    from cluster.commands.generate import print_json, print_plain
    from cluster.commands.local_generate import generate_locally
    from cluster.config import load

    results = run(generate_locally(lines, params, load(config, {"--model": model}), _say))
    if as_json:
        for result in results:
            print_json(result)
    else:
        print_plain(results)


@app.command()
def status(
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
    api_key_file: KeyOption = None,
    ca: CaOption = None,
) -> None:
    """Shows the workers, their load and their KV blocks."""
    from cluster.commands.status import status as show

    require_host_port("--url", url)
    run(show(url, access=read_access(api_key_file, ca, url), as_json=as_json))


@app.command(epilog=_examples("tandem worker decode --gateway 10.0.0.1:50052 --host 10.0.0.2"))
def worker(
    role: Annotated[WorkerRole, typer.Argument(help="What the worker does.")],
    gateway: Annotated[str, typer.Option("--gateway", metavar="HOST:PORT", help="The gateway it reports to.")],
    host: Annotated[str, typer.Option("--host", help="Where it listens, and where others reach it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="P", min=0, max=65535, help="0: any free one.")] = 0,
    worker_id: Annotated[str | None, typer.Option("--id", metavar="ID", help="Its name; <role>-<pid> if none.")] = None,
    config: ConfigOption = None,
    model: ModelOption = None,
    lifeline: Annotated[bool, typer.Option("--lifeline", hidden=True, help="End when stdin does.")] = False,
) -> None:
    """Runs one worker as a plain process, without Ray."""
    incarnation = time.time_ns()
    from cluster.config import load
    from cluster.worker_spec import WorkerSpec

    if worker_id == "":
        raise ConfigError("--id: got '', expected a name of at least one character")
    loaded = load(config, {"--model": model})
    require_host_port("--gateway", gateway)
    if not lifeline:
        # With one it was started by a service on this machine.
        require_reachable("--host", host, gateway)
    spec = WorkerSpec(role.value, worker_id or f"{role.value}-{os.getpid()}", gateway, host, port)

    from cluster.commands.worker import work

    set_up_logs(loaded.logging, spec.worker_id)
    try:
        run(work(spec, loaded, incarnation=incarnation, has_lifeline=lifeline))
    except Stopped:
        raise typer.Exit from None


@app.command()
def demo(model: ModelOption = None, address: AddressOption = None) -> None:
    """Starts a service, streams three answers side by side, shows where the time went, and shuts down."""
    from cluster.config import load

    loaded = load(None, {"--model": model, "--address": address, "--grpc-port": 0})

    from cluster.commands.demo import show_demo

    run(show_demo(loaded))


@app.command()
def fetch(model: ModelOption = None) -> None:
    """Puts a model into the cache, so that nothing has to wait for it later, and prints where its files are."""
    from cluster.config import load
    from engine.model_source import resolve

    print(resolve(load(None, {"--model": model}).engine.model, _say).path)


@app.command()
def profile(
    out: Annotated[Path, typer.Option("--out", metavar="F.json", help="The file that --profile takes afterwards.")],
    model: ModelOption = None,
    config: ConfigOption = None,
    device: Annotated[str | None, typer.Option("--device", metavar="auto|cpu|cuda", help="What to measure.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", metavar="N", help="Threads of a worker on a CPU.")] = None,
    cpus: Annotated[str | None, typer.Option("--cpus", metavar="0,2-3", help="CPUs that they are bound to.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps: half a minute instead of three.")] = False,
    seed: Annotated[int, typer.Option("--seed", metavar="S", help="Decides the order of the steps.")] = 0,
) -> None:
    """Measures the steps of the engine on this device, and writes what predicts them."""
    from cluster.commands.profile import profile as measure
    from cluster.config import load

    loaded = load(config, {"--model": model})
    run(measure(loaded, out, device=device, threads=threads, cpus=cpus, is_quick=quick, seed=seed))


@app.command()
def certs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where they go; a CA that is there is used again.")],
    host: Annotated[
        list[str] | None,
        typer.Option(
            "--host", metavar="NAME", help="A name or address by which clients reach the gateway; repeatable."
        ),
    ] = None,
    days: Annotated[int, typer.Option("--days", metavar="N", min=1, max=825, help="How long they are good.")] = 90,
) -> None:
    """Makes a CA and certificates for gateway, workers and the clients' port, for development."""
    from cluster.security.certs import make_certs

    gateway, workers, clients = make_certs(folder, [*(host or ()), "localhost", "127.0.0.1"], days)
    print(f"security:\n  gateway_certs: {gateway}\n  worker_certs: {workers}\n  client_certs: {clients}")


app.command("emulate")(emulate_command())
app.command("plan")(plan_command())
app.command("bench")(bench_command())
app.command("chaos")(chaos_command())
app.command("top")(top_command())
app.command("gateway")(gateway_command())
app.command("health")(health_command())
app.add_typer(keys_commands(), name="keys")
app.add_typer(config_commands(), name="config")


def main() -> None:
    """The program's entry."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: Sequence[str]) -> int:
    """Runs one command; returns the exit code."""
    try:
        quiet_libraries()
        logging.basicConfig(level=read_environment().log_level or logging.WARNING, format=TEXT)
        code = app(list(arguments), standalone_mode=False)
        sys.stdout.flush()
    except TyperException as error:
        return _fail(error.format_message())
    except TandemError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # The reader of our output went away. Python would complain about that once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Stopped as stopped:
        return stopped.exit_code
    return code if isinstance(code, int) else 0


def _fail(message: str) -> int:
    print("tandem: error: " + " ".join(message.split()), file=sys.stderr)
    return ERROR_EXIT_CODE


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
