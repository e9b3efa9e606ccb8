"""Tells text from calls of tools in an answer, as it comes.

text ─ sign ─▶ heading {"name": …, "arguments": ─▶ arguments {…} ─▶ rest ─┬─ another call ─▶ heading
  ▲                        └── no such function, or no JSON ─▶ text       └─ its end ─▶ text

Arguments are passed on as the model writes them, so that a client can follow a long one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Set
from dataclasses import dataclass
from typing import TypeAlias

from engine.tools import ToolSyntax

HEADING = re.compile(r'[\s\[,]*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
MARKS = re.compile(r'\\.?|["{}\[\]]', re.DOTALL)


@dataclass(frozen=True, slots=True)
class CallBegins:
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the arguments of the call that began last."""

    text: str


Piece: TypeAlias = str | CallBegins | Arguments


class ToolReader:
    """Of one choice. `names`: the functions that there are; what calls others is text."""

    def __init__(self, syntax: ToolSyntax, names: Set[str]) -> None:
        self._syntax = syntax
        self._names = names
        self._end, self._between, self._closing = (
            text.strip() for text in (syntax.end, syntax.between, syntax.closing)
        )
        self._step = self._text
        # What came and is not understood yet.
        self._held = ""
        self._has_spoken = False
        self._depth = 0
        self._is_quoted = False
        self.has_called = False

    def push(self, text: str) -> list[Piece]:
        """What is known of the answer now that was not before."""
        self._held += text
        pieces: list[Piece] = []
        while True:
            before = (self._step, len(self._held))
            pieces += self._step()
            if (self._step, len(self._held)) == before:
                return pieces

    def end(self) -> list[Piece]:
        """The rest, when nothing more comes. A call that was cut off stays as far as it got."""
        held, self._held = self._held, ""
        if self._step == self._heading and (call := self._call(held)) is not None:
            return call
        is_text = self._step in (self._text, self._heading) and not (self.has_called and held.isspace())
        return [held] if is_text and held else []

    def _text(self) -> list[Piece]:
        sign = self._syntax.sign
        if not sign:
            # A call is all there is, or there is none.
            if not self._has_spoken and self._held.lstrip().startswith("{"):
                self._step = self._heading
                return []
            return self._say(len(self._held)) if self._held.strip() else []
        at = self._held.find(sign)
        if at < 0:
            return self._say(_undecided(self._held, sign))
        # Space before a call is none of the text's.
        self._step = self._heading
        return self._say(len(self._held[:at].rstrip()))

    def _heading(self) -> list[Piece]:
        text = self._held.lstrip().removeprefix(self._syntax.sign)
        skipped = len(self._held) - len(text)
        if found := HEADING.match(text):
            name = _name(found[1])
            if name not in self._names:
                return self._no_call(skipped + found.end())
            self._held = text[found.end() :]
            self._step, self._depth, self._is_quoted, self.has_called = self._arguments, 0, False, True
            return [CallBegins(name)]
        if not self._end or self._end not in text:
            return []
        length = skipped + text.index(self._end) + len(self._end)
        call = self._call(self._held[:length])
        if call is None:
            return self._no_call(length)
        self._held, self._step = self._held[length:], self._text
        return call

    def _arguments(self) -> list[Piece]:
        length = len(self._held)
        for mark in MARKS.finditer(self._held):
            if mark[0] == "\\":
                # What it escapes is still to come.
                length = mark.start()
            elif mark[0] == '"':
                self._is_quoted = not self._is_quoted
            elif not self._is_quoted and mark[0] in ("{", "["):
                self._depth += 1
            elif not self._is_quoted and mark[0] in ("}", "]"):
                self._depth -= 1
                if not self._depth:
                    length, self._step = mark.end(), self._rest
                    break
        text, self._held = self._held[:length], self._held[length:]
        return [Arguments(text)] if text else []

    def _rest(self) -> list[Piece]:
        """From the end of the arguments to what comes after the call: fixed text, of which nothing is passed on."""
        text = self._held.lstrip().removeprefix("}").lstrip()
        if not self._syntax.sign:
            self._held = ""
        elif self._end and text.startswith(self._end):
            self._held, self._step = text.removeprefix(self._end), self._text
        elif not self._end and text.startswith(self._between):
            self._held, self._step = text.removeprefix(self._between), self._heading
        elif self._closing and text.startswith(self._closing):
            self._held, self._step = text.removeprefix(self._closing), self._text
        elif not (self._end or self._closing).startswith(text):
            self._held, self._step = text, self._text
        return []

    def _say(self, length: int) -> list[Piece]:
        text, self._held = self._held[:length], self._held[length:]
        self._has_spoken |= bool(text)
        return [text] if text else []

    def _no_call(self, length: int) -> list[Piece]:
        """What is held looked like a call and is none, as far as `length`."""
        self._step = self._text
        return self._say(length)

    def _call(self, text: str) -> list[Piece] | None:
        """A whole call whose parts stand in another order than usual."""
        text = text.strip().removeprefix(self._syntax.sign).removesuffix(self._end)
        try:
            call = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(call, dict) or call.get("name") not in self._names:
            return None
        arguments = call.get("arguments", call.get("parameters", {}))
        if not isinstance(arguments, dict):
            return None
        self.has_called = True
        return [CallBegins(call["name"]), Arguments(json.dumps(arguments, ensure_ascii=False))]


def _undecided(text: str, sign: str) -> int:
    """Where the part of a text begins that may belong to a sign, or is space before one."""
    start = len(text)
    for length in range(min(len(text), len(sign) - 1), 0, -1):
        if text.endswith(sign[:length]):
            start -= length
            break
    return len(text[:start].rstrip())


def _name(quoted: str) -> str:
    try:
        return str(json.loads(quoted))
    except ValueError:
        return ""
