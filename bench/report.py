"""Tables in Markdown, and their place in docs/performance.md."""

from __future__ import annotations

import datetime
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def stamp(device: str, argv: Sequence[str] | None = None) -> str:
    """Which command, when, on what. Of files in the command only their names: the page says nothing of a machine's
    folders. `argv` as sys.argv."""
    program, *words = sys.argv if argv is None else argv
    command = shlex.join(["python", "-m", f"bench.{Path(program).stem}", *map(_without_folders, words)])
    return f"`{command}`, {datetime.date.today().isoformat()}, {device}."


def write_section(name: str, text: str, page: Path = PAGE) -> None:
    """Replaces what stands between the page's markers of this name; raises ValueError unless it has them once."""
    start, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    old = page.read_text(encoding="utf-8")
    new, count = re.subn(
        f"{re.escape(start)}.*?{re.escape(end)}", lambda _: f"{start}\n{text}\n{end}", old, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"{page}: the markers {start} and {end} stand there {count} times, expected once")
    page.write_text(new, encoding="utf-8")


def _without_folders(word: str) -> str:
    """Absolute and relative paths lose their folders, in lists that colons separate too; a hub's owner/name keeps
    its own."""
    return ":".join(Path(part).name if part.startswith(("/", "~/", "./", "../")) else part for part in word.split(":"))
