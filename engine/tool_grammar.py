"""A grammar that makes answers call tools as a model of some family writes it, each with arguments of its schema.

calls only          call, or several
text or calls       any text up to the sign of a call, from there on calls
an object or calls  as a JSON schema says, or calls
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from engine.structure import JSON_LAYOUT, Structure
from engine.tools import NO_ARGUMENTS, Tool, ToolSyntax

_ARGUMENTS = re.compile(r"^arguments_(\d+): %json (.*)$", re.MULTILINE)


def calls_only(syntax: ToolSyntax, sign_id: int | None, tools: Sequence[Tool], *, has_many: bool) -> Structure:
    """Answers that call one of `tools`, or several with `has_many`. `sign_id`: the token that the syntax's sign is,
    where that is no text (a special token)."""
    calls = _calls(syntax, sign_id, has_many=has_many)
    return _grammar([f"start: {_text(syntax, sign_id, syntax.opening)} {calls}"], syntax, sign_id, tools)


def text_or_calls(syntax: ToolSyntax, sign_id: int | None, tools: Sequence[Tool], *, has_many: bool) -> Structure:
    """Answers of any text, which may be followed by calls; where the syntax has no sign, may be a call instead."""
    if not syntax.sign:
        return _grammar(["start: call | TEXT", r"TEXT: /[^\s{](.|\n)*/"], syntax, sign_id, tools)
    # A lexeme that ends with the sign ends there as soon as it can: what looks like a call is one.
    said = "said" if sign_id is not None else "said[lazy]"
    first = _text(syntax, sign_id, (syntax.opening + syntax.begin).removeprefix(syntax.sign))
    rules = [
        f"start: TEXT | said {first} {_calls(syntax, sign_id, has_many=has_many, is_begun=True)}",
        f"{said}: TEXT {_text(syntax, sign_id, syntax.sign)}",
        r"TEXT: /(.|\n)*/",
    ]
    return _grammar(rules, syntax, sign_id, tools)


def object_or_calls(
    syntax: ToolSyntax, sign_id: int | None, tools: Sequence[Tool], schema: Mapping[str, Any], *, has_many: bool
) -> Structure:
    """Answers that are valid against `schema`, or calls."""
    assert syntax.sign, "a call must not look like an object"
    calls = _calls(syntax, sign_id, has_many=has_many)
    rules = [f"start: {_text(syntax, sign_id, syntax.opening)} {calls} | answer", f"answer: {_json(schema)}"]
    return _grammar(rules, syntax, sign_id, tools)


def argument_schemas(structure: Structure) -> list[tuple[int, Structure]]:
    """What a structure that was made here holds arguments to: the number of the tool, and the schema alone."""
    return [(int(index), Structure("json_schema", text)) for index, text in _ARGUMENTS.findall(structure.text)]


def _grammar(rules: list[str], syntax: ToolSyntax, sign_id: int | None, tools: Sequence[Tool]) -> Structure:
    begin, end = (_text(syntax, sign_id, text) for text in (syntax.begin, syntax.end))
    heads = [_quoted(f'{{"name": {_quoted(tool.name)}, "{syntax.arguments_key}": ') for tool in tools]
    bodies = [f'{head} arguments_{index} "}}"' for index, head in enumerate(heads)]
    rules = [*rules, f"call: {begin} rest", f"rest: body {end}", "body: " + " | ".join(bodies)]
    for index, tool in enumerate(tools):
        nothing = {**NO_ARGUMENTS, "additionalProperties": False}
        schema = nothing if tool.parameters is None else {"type": "object", **tool.parameters}
        rules.append(f"arguments_{index}: {_json(schema)}")
    return Structure("grammar", "\n".join(rules))


def _calls(syntax: ToolSyntax, sign_id: int | None, *, has_many: bool, is_begun: bool = False) -> str:
    between = _text(syntax, sign_id, syntax.between)
    more = f"({between} call)*" if has_many and between else ""
    return f"{'rest' if is_begun else 'call'} {more} {_text(syntax, sign_id, syntax.closing)}"


def _text(syntax: ToolSyntax, sign_id: int | None, text: str) -> str:
    """A part of a rule for a fixed text."""
    if sign_id is not None and syntax.sign and text.startswith(syntax.sign):
        return f"<[{sign_id}]> {_text(syntax, sign_id, text.removeprefix(syntax.sign))}"
    return _quoted(text) if text else ""


def _quoted(text: str) -> str:
    """As JSON and Lark both write it, characters outside ASCII as they are: so models write them too."""
    return json.dumps(text, ensure_ascii=False)


def _json(schema: Mapping[str, Any]) -> str:
    """A rule for what is valid against a JSON schema."""
    return "%json " + json.dumps({**schema, "x-guidance": JSON_LAYOUT}, ensure_ascii=False)
