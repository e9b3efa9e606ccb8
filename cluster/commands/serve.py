"""`tandem serve`: keeps a service up until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import sys
from pathlib import Path

from rich.console import Console

from cluster.collector import set_aside_what_is_loaded
from cluster.config import TandemConfig
from cluster.progress import Progress
from cluster.rolling_restart import restart_workers
from cluster.service import Service, running_service
from engine.errors import TandemError

DEFAULT_URL = "127.0.0.1:50051"
# How soon a worker that was given up ends the service.
CHECK_S = 0.5


async def serve(config: TandemConfig) -> None:
    """Returns when its terminal is gone; cancelling it ends the service in good order, too. Any other SIGHUP restarts
    the workers, one at a time. Raises the TandemError of what cannot be started, or of a worker that was given up, once
    running requests are done: who supervises the service starts all of it again."""
    # On stdout, so that stderr holds nothing but what went wrong.
    progress = Progress(Console(highlight=False))
    has_terminal = sys.stdin.isatty()
    hung_up = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hung_up.set)
    async with running_service(config, progress) as service:
        set_aside_what_is_loaded()
        model = service.gateway.model
        print(f"serving {model.name} at {service.address}")
        certs = config.security.client_certs
        if service.http_address:
            web = f"{'http' if certs is None else 'https'}://{service.http_address}"
            print(f"OpenAI's interface at {web}/v1")
            print(f"a page that shows what it does at {web}/")
        print(f"workers report to {service.registry_address}")
        command = command_to_try(
            service.address,
            has_chat=model.has_chat_template,
            needs_key=config.gateway.auth.is_required,
            ca=None if certs is None else certs / "ca.crt",
        )
        print(f"try:  {command}", flush=True)
        try:
            while True:
                await _until(hung_up, service)
                # The kernel sends the same signal when a terminal goes away: then nobody is there to end the service.
                if has_terminal and not sys.stdin.isatty():
                    _say_no_more()
                    return
                await _restart(service, config, progress)
        except TandemError as error:
            # Before it drains, not only when all is over.
            progress.line(str(error))
            raise
        finally:
            progress.line("shutting down")


async def _until(hung_up: asyncio.Event, service: Service) -> None:
    """Until the signal. Raises the TandemError of a worker that was given up meanwhile."""
    while not hung_up.is_set():
        service.fleet.check()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CHECK_S):
                await hung_up.wait()
    hung_up.clear()


def _say_no_more() -> None:
    """Writing to a terminal that is gone would be an error."""
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


async def _restart(service: Service, config: TandemConfig, progress: Progress) -> None:
    try:
        await restart_workers(service.fleet, service.gateway, config.cluster.start_timeout_s, progress.line)
    except TandemError as error:
        # What ends the service is told there.
        service.fleet.check()
        progress.line(str(error))


def command_to_try(address: str, *, has_chat: bool, needs_key: bool = False, ca: Path | None = None) -> str:
    """A command that works when pasted into a shell in this folder; where it needs a key, once KEY names its file."""
    command = [_own_name(), "generate", "What is the capital of France?" if has_chat else "The capital of France is"]
    if has_chat:
        command.append("--chat")
    if address != DEFAULT_URL:
        command += ["--url", address]
    if needs_key:
        command += ["--api-key-file", "KEY"]
    if ca is not None:
        command += ["--ca", str(ca)]
    return shlex.join([*command, "--temperature", "0", "--max-tokens", "40"])


def _own_name() -> str:
    """How this program was called, if by its name; a virtual environment need not be on the PATH."""
    path = Path(sys.argv[0])
    if path.name != "tandem":
        return "tandem"
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
