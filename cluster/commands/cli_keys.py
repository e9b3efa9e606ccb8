"""`tandem keys` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def keys_commands() -> typer.Typer:
    keys = typer.Typer(help="API keys of a service's tenants.")

    @keys.callback()
    def _keys() -> None:
        pass

    @keys.command()
    def new(
        tenant: Annotated[str, typer.Option("--tenant", metavar="NAME", help="Whose key it is.")],
        file: Annotated[
            Path, typer.Option("--file", metavar="F", help="Where its hash is added: the service's auth.keys_file.")
        ],
    ) -> None:
        """Makes a key and prints it, this once: the file holds only its hash. A line that is deleted ends its key."""
        from cluster.security.api_keys import new_key

        print(new_key(tenant, file))

    return keys
