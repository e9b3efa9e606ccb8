"""`tandem top` on the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from typer import Option

from cluster.client_access import read_access
from cluster.commands.flags import command_of
from cluster.commands.running import Stopped, run
from cluster.host_port import require_host_port
from engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TopOptions:
    """Each field is a flag."""

    url: str = "127.0.0.1:50051"
    interval_s: float = 1.0
    once: bool = False
    api_key_file: Path | None = None
    ca: Path | None = None


FLAGS = {
    "url": Option("--url", metavar="HOST:PORT", help="Where the service answers."),
    "interval_s": Option("--interval-s", metavar="S", help="From one look to the next."),
    "once": Option("--once", help="Show it once, with the rates of one interval, and exit."),
    "api_key_file": Option(
        "--api-key-file", metavar="F", help="An operator's API key or token to call with; else TANDEM_API_KEY."
    ),
    "ca": Option("--ca", metavar="F", help="Certificates of who signs the service's own: connects by TLS."),
}


def top_command() -> Callable[..., None]:
    """`tandem top`, for Typer."""

    def top(options: TopOptions) -> None:
        """Shows pools, queues, KV blocks, attainment and rates, and goes on showing them. q or Ctrl-C ends it."""
        from cluster.commands.top import top as show

        require_host_port("--url", options.url)
        if not 0.1 <= options.interval_s <= 3600:
            raise ConfigError(f"--interval-s: got {options.interval_s}, expected a number in [0.1, 3600]")
        access = read_access(options.api_key_file, options.ca, options.url)
        try:
            run(show(options.url, access=access, interval_s=options.interval_s, is_once=options.once))
        except Stopped:
            # Ctrl-C is how it is meant to end, unless one status was asked for.
            if options.once:
                raise

    return command_of(TopOptions, FLAGS, top)
