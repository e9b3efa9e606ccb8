"""`tandem config` on the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def config_commands() -> typer.Typer:
    config = typer.Typer(help="The configuration: what can be set, and whether a file is in good order.")

    @config.callback()
    def _config() -> None:
        pass

    @config.command()
    def schema() -> None:
        """Prints a JSON Schema of the configuration, for editors and for checks elsewhere."""
        from cluster.commands.config import schema_text

        print(schema_text())

    @config.command()
    def reference() -> None:
        """Prints every key with its type, its default and what it means, as Markdown."""
        from cluster.commands.config import reference_text

        print(reference_text())

    @config.command()
    def check(
        file: Annotated[Path, typer.Argument(metavar="F", help="A YAML file, as `tandem serve --config` takes it.")],
        files: Annotated[
            bool, typer.Option("--files", help="Read what it names as well: certificates, keys, salt, profile.")
        ] = False,
    ) -> None:
        """Says all that is wrong with a file, by line and key; exit code 2 then. Starts nothing."""
        from cluster.commands.config import check as check_file

        if problems := check_file(file, reads_files=files):
            for problem in problems:
                print(f"tandem: error: {problem}", file=sys.stderr)
            raise typer.Exit(2)

    return config
