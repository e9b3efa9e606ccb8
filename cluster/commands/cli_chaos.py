"""The flags of `tandem chaos`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.running import run
from engine.errors import ConfigError


def chaos_command() -> Callable[..., None]:
    def chaos(
        plan: Annotated[
            Path | None,
            typer.Option(
                "--plan", metavar="F.yaml", help="Load and faults; without: a SIGKILL every 5 s for a minute."
            ),
        ] = None,
        config: Annotated[
            Path | None, typer.Option("--config", metavar="F", help="YAML file with the cluster's configuration.")
        ] = None,
        seconds: Annotated[
            float | None, typer.Option("--seconds", metavar="S", help="How long faults happen, whatever the plan says.")
        ] = None,
        prefill: Annotated[int, typer.Option("--prefill", metavar="N", help="Number of prefill workers.")] = 2,
        decode: Annotated[int, typer.Option("--decode", metavar="N", help="Number of decode workers.")] = 2,
        api_key_file: Annotated[
            Path | None,
            typer.Option(
                "--api-key-file", metavar="F", help="Where gateway.auth is set: a file with an operator's key."
            ),
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    ) -> None:
        """Runs a local cluster under load, with faults on its workers and links, and reports what clients saw. Exit
        code 1 when an answer was wrong or missing, something is left behind or was held too long, or a damaged KV
        frame went unnoticed."""
        from cluster.chaos.plan import read_plan
        from cluster.commands.chaos import chaos as disturb
        from cluster.config import load
        from cluster.worker_spec import worker_names

        flags = {"--prefill": prefill, "--decode": decode, "--address": "none", "--grpc-port": 0}
        loaded = load(config, flags)
        read = read_plan(plan, [worker_id for _, worker_id in worker_names(loaded.cluster)])
        if seconds is not None:
            if not seconds > 0:
                raise ConfigError(f"--seconds: got {seconds:g}, expected more than 0")
            read = read.model_copy(update={"seconds": seconds})
        # Workers that are killed on purpose are started again however often that is.
        cluster = loaded.cluster.model_copy(update={"max_restarts": 1_000_000})
        if not run(disturb(loaded.model_copy(update={"cluster": cluster}), read, api_key_file, as_json=as_json)):
            raise typer.Exit(1)

    return chaos
