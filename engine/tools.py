"""Functions that a model may ask to have called, and how models of the known families write such calls.

    Hermes, Qwen   <tool_call>⏎{"name": "f", "arguments": {…}}⏎</tool_call>   each call by itself, after any text
    Mistral        [TOOL_CALLS][{"name": "f", "arguments": {…}}, …]            a list, after any text
    Llama 3        {"name": "f", "parameters": {…}}                           one call, and no text beside it

A model whose chat template knows no tools is told of them in a system turn, and is asked to write as Hermes does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function. `parameters` is the JSON schema of its arguments, an object; None: it takes none. `is_strict`: calls
    must be valid against it."""

    name: str
    description: str | None = field(default=None, repr=False)
    parameters: Mapping[str, Any] | None = field(default=None, repr=False)
    is_strict: bool = False

    @property
    def chars(self) -> int:
        """Characters of its description."""
        return len(json.dumps(self.described(), ensure_ascii=False))

    def described(self) -> dict[str, Any]:
        """As chat templates want it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = self.parameters if self.parameters is not None else NO_ARGUMENTS
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model asked for earlier in a chat. `arguments`: text of a JSON object."""

    call_id: str
    name: str
    arguments: str = field(repr=False)

    def described(self) -> dict[str, Any]:
        """As chat templates want it."""
        function = {"name": self.name, "arguments": json.loads(self.arguments)}
        return {"id": self.call_id, "type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolSyntax:
    """How a model writes calls: `opening` before the first of them, `closing` after the last, `begin` and `end` around
    each, `between` two. `arguments_key`: what a call names its arguments. "" for `between`: there is one call only; for
    `sign`: a call is all there is, else the text that announces one."""

    sign: str
    opening: str
    begin: str
    end: str
    between: str
    closing: str
    arguments_key: str = "arguments"


HERMES = ToolSyntax("<tool_call>", "", "<tool_call>\n", "\n</tool_call>", "\n", "")
MISTRAL = ToolSyntax("[TOOL_CALLS]", "[TOOL_CALLS][", "", "", ", ", "]")
LLAMA = ToolSyntax("", "", "", "", "", "", "parameters")


def syntax_of(template: str) -> ToolSyntax | None:
    """That of a model whose chat template takes tools; None for one that is not known here."""
    if HERMES.sign in template:
        return HERMES
    if MISTRAL.sign in template:
        return MISTRAL
    if '"parameters"' in template:
        return LLAMA
    return None


def told_of(tools: Sequence[Tool], messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A chat with tools as one without: for a template that knows none of them, or writes calls in an unknown way."""
    turns: list[dict[str, Any]] = []
    for message in messages:
        turn = _plain(message)
        if turns and message["role"] == "tool" and turns[-1]["role"] == "user":
            # Templates that know no tools mostly want the user and the assistant to take turns.
            turns[-1]["content"] += f"\n{turn['content']}"
        else:
            turns.append(turn)
    if not tools:
        return turns
    described = "\n".join(json.dumps(tool.described(), ensure_ascii=False) for tool in tools)
    text = (
        f"You may call functions to help with the user's request. They are:\n<tools>\n{described}\n</tools>\n"
        "To call one, write its name and arguments as JSON between these tags:\n"
        '<tool_call>\n{"name": <function-name>, "arguments": <arguments-object>}\n</tool_call>'
    )
    if turns and turns[0]["role"] == "system":
        turns[0]["content"] += f"\n\n{text}"
        return turns
    return [{"role": "system", "content": text}, *turns]


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A turn as role and text."""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    written = [f"{HERMES.begin}{json.dumps(call, ensure_ascii=False)}{HERMES.end}" for call in calls]
    return {"role": message["role"], "content": "\n".join([message["content"]] * bool(message["content"]) + written)}
