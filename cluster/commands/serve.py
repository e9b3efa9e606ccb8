"""`tandem serve`: keeps a service up until a signal ends it."""

from __future__ import annotations

import asyncio
import shlex
import sys
from pathlib import Path

from rich.console import Console

from cluster.config import TandemConfig
from cluster.progress import Progress
from cluster.service import running_service

DEFAULT_URL = "127.0.0.1:50051"


async def serve(config: TandemConfig) -> None:
    """Never returns; cancelling it ends the service in good order."""
    # On stdout, so that stderr holds nothing but what went wrong.
    progress = Progress(Console(highlight=False))
    async with running_service(config, progress) as service:
        model = service.gateway.model
        print(f"serving {model.name} at {service.address}")
        print(f"try:  {command_to_try(service.address, has_chat=model.has_chat_template)}", flush=True)
        try:
            await asyncio.Event().wait()
        finally:
            progress.line("shutting down")


def command_to_try(address: str, *, has_chat: bool) -> str:
    """A command that works when pasted into a shell in this folder."""
    command = [_own_name(), "generate", "What is the capital of France?" if has_chat else "The capital of France is"]
    if has_chat:
        command.append("--chat")
    if address != DEFAULT_URL:
        command += ["--url", address]
    return shlex.join([*command, "--temperature", "0", "--max-tokens", "40"])


def _own_name() -> str:
    """How this program was called, if by its name; a virtual environment need not be on the PATH."""
    path = Path(sys.argv[0])
    if path.name != "tandem":
        return "tandem"
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
