"""What the demo shows: answers growing side by side, or line by line where there is no terminal, then the receipts."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.columns import Columns
from rich.console import Console, ConsoleOptions, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

# Rows of a pane, and rows of the terminal that are left for what stands above and below the panes.
PANE_ROWS_MAX = 18
PANE_ROWS_MIN = 6
OTHER_ROWS = 4
FRAME_COLUMNS = 4
PROMPT_ROWS = 2
LINE_CHARS = 72


@dataclass(slots=True)
class Pane:
    """One request as the screen shows it."""

    title: str
    prompt: str
    text: str = ""
    status: str = "sent"
    is_waiting: bool = True
    color: str = "cyan"


class SideBySide:
    """A rich renderable: all panes next to one another, each showing the end of its answer."""

    def __init__(self, panes: Sequence[Pane]) -> None:
        self._panes = panes

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # One space between panes, and none after the last.
        width = (options.max_width - len(self._panes) + 1) // len(self._panes)
        rows = max(PANE_ROWS_MIN, min(PANE_ROWS_MAX, console.height - OTHER_ROWS))
        yield Columns([_panel(pane, width, rows) for pane in self._panes], padding=(0, 1, 0, 0))


class Lines:
    """Prints each answer's text in whole lines, with the request's name in front."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._open: dict[str, str] = {}

    def add(self, title: str, text: str) -> None:
        rest = self._open.get(title, "") + text
        while "\n" in rest or len(rest) > LINE_CHARS:
            line, rest = _first_line(rest)
            self._print(title, line)
        self._open[title] = rest

    def end(self, title: str, status: str) -> None:
        self._print(title, self._open.pop(title, ""))
        self._print(title, f"[{status}]")

    def _print(self, title: str, line: str) -> None:
        if line.strip():
            self._write(f"{title:>8} │ {line}")


def _first_line(text: str) -> tuple[str, str]:
    line, newline, rest = text.partition("\n")
    if newline and len(line) <= LINE_CHARS:
        return line, rest
    cut = text.rfind(" ", 1, LINE_CHARS)
    cut = cut if cut > 0 else LINE_CHARS
    return text[:cut], text[cut:].lstrip(" ")


def _panel(pane: Pane, width: int, rows: int) -> Panel:
    columns = width - FRAME_COLUMNS
    asked = textwrap.wrap(pane.prompt, columns, max_lines=PROMPT_ROWS, placeholder=" …")
    # The frame takes two rows, and one stays empty between question and answer.
    answer = _wrap(pane.text, columns)[-(rows - len(asked) - 3) :]
    body = Text("\n".join(asked) + "\n\n", style="dim")
    body.append("\n".join(answer), style="none")
    return Panel(
        body,
        title=pane.title,
        subtitle=pane.status,
        width=width,
        height=rows,
        border_style=pane.color,
    )


def _wrap(text: str, columns: int) -> list[str]:
    lines: list[str] = []
    for line in text.expandtabs(4).split("\n"):
        # Spaces at the start of a line are code's indentation and stay.
        lines += textwrap.wrap(line, columns, replace_whitespace=False) or [""]
    return lines


@dataclass(frozen=True, slots=True)
class ReceiptRow:
    """One line of the table: its name, and the text that a request's answer gives for it."""

    name: str
    show: Callable[[dict[str, Any]], str] = field(repr=False)


def _seconds(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda answer: f"{answer['receipt'][name]:.3f} s"


def _early_share(answer: dict[str, Any]) -> str:
    receipt = answer["receipt"]
    if not receipt["kv_bytes"]:
        return "-"
    return f"{100 * receipt['kv_bytes_before_first_token'] / receipt['kv_bytes']:.1f} %"


def _tokens(answer: dict[str, Any]) -> str:
    usage = answer["usage"]
    return f"{usage['prompt_tokens']} → {usage['completion_tokens']}"


RECEIPT_ROWS = (
    ReceiptRow("tokens in → out", _tokens),
    ReceiptRow("gateway queue", _seconds("gateway_queue_s")),
    ReceiptRow("prefill queue", _seconds("prefill_queue_s")),
    ReceiptRow("prefill", _seconds("prefill_s")),
    ReceiptRow("KV exposed", _seconds("kv_exposed_s")),
    ReceiptRow("decode queue", _seconds("decode_queue_s")),
    ReceiptRow("decode", _seconds("decode_s")),
    ReceiptRow("time to first token", _seconds("ttft_s")),
    ReceiptRow("time per output token", _seconds("tpot_s")),
    ReceiptRow("KV moved", lambda answer: f"{answer['receipt']['kv_bytes'] / 1e6:.1f} MB"),
    ReceiptRow("KV sent before first token", _early_share),
)


def receipt_table(answers: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    """Receipts of finished requests, (title, answer) each, one column per request."""
    table = Table(title="Where the time went", title_justify="left", title_style="bold")
    table.add_column("")
    for title, _ in answers:
        table.add_column(title, justify="right")
    for row in RECEIPT_ROWS:
        table.add_row(row.name, *(row.show(answer) for _, answer in answers))
    return table
