"""The flags of commands for a service whose parts somebody else starts: `tandem gateway | health`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from cluster.client_access import read_ca
from cluster.commands.running import Stopped, run
from cluster.host_port import require_host_port
from cluster.logs.lines import set_up_logs
from engine.errors import ConfigError


def gateway_command() -> Callable[..., None]:
    def gateway(
        config: Annotated[
            Path | None, typer.Option("--config", metavar="F", help="YAML file with the configuration.")
        ] = None,
        model: Annotated[
            str | None, typer.Option("--model", metavar="M", help="As of its workers: a name, a file or a folder.")
        ] = None,
        grpc_port: Annotated[int | None, typer.Option("--grpc-port", metavar="P", help="0: any free one.")] = None,
        http_port: Annotated[
            int | None,
            typer.Option("--http-port", metavar="P", help="The port of OpenAI's interface; 0: any free one."),
        ] = None,
    ) -> None:
        """Runs a gateway without workers: those that `tandem worker` starts, anywhere, report to it."""
        from cluster.config import load

        loaded = load(config, {"--model": model, "--grpc-port": grpc_port, "--http-port": http_port})

        from cluster.commands.gateway import keep_gateway

        set_up_logs(loaded.logging)
        try:
            run(keep_gateway(loaded))
        except Stopped:
            # A signal is how a gateway is meant to end.
            raise typer.Exit from None

    return gateway


def health_command() -> Callable[..., None]:
    def health(
        url: Annotated[
            str, typer.Option("--url", metavar="HOST:PORT", help="A gateway's port for clients, or a worker's.")
        ] = "127.0.0.1:50051",
        service: Annotated[
            str, typer.Option("--service", metavar="NAME", help="'liveness': is it alive? Without: is it ready?")
        ] = "",
        certs: Annotated[
            Path | None, typer.Option("--certs", metavar="FOLDER", help="A worker's certificates, to ask a worker.")
        ] = None,
        ca: Annotated[
            Path | None, typer.Option("--ca", metavar="F", help="Certificates of who signs the gateway's for clients.")
        ] = None,
        timeout_s: Annotated[float, typer.Option("--timeout-s", metavar="S", help="How long to wait for it.")] = 3.0,
    ) -> None:
        """Asks a gateway or a worker for its health; exit code 0 only where it is SERVING."""
        from cluster.commands.health import check_health

        require_host_port("--url", url)
        if certs is not None and ca is not None:
            raise ConfigError("health: got both --certs and --ca, expected one: a worker's port or the clients'")
        if not timeout_s > 0:
            raise ConfigError(f"--timeout-s: got {timeout_s:g}, expected more than 0")
        signers = None if ca is None else read_ca(ca)
        run(check_health(url, service, ca=signers, certs=certs, timeout_s=timeout_s))

    return health
