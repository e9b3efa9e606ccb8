"""How clients offer tools: `tools`, `tool_choice` and `parallel_tool_calls`, and the calls in turns of a chat."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from engine.errors import InvalidArgument
from engine.structure import Structure
from engine.tool_grammar import calls_only, object_or_calls, text_or_calls
from engine.tools import Tool, ToolCall, ToolSyntax

MAX_TOOLS = 128
FunctionName = Annotated[str, Field(min_length=1, max_length=128)]


class FunctionFields(BaseModel):
    """`parameters`: a JSON schema of an object."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolField(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    function: FunctionFields


class ChosenFunction(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str


class ChosenTool(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    function: ChosenFunction


class CalledFunction(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    name: str
    arguments: str


class CallField(BaseModel):
    """A call of an earlier answer, sent back."""

    model_config = ConfigDict(extra="ignore", strict=True)

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    def call(self, field: str) -> ToolCall:
        """Raises InvalidArgument for arguments that are no JSON object."""
        try:
            is_object = isinstance(json.loads(self.function.arguments or "{}"), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise InvalidArgument(f"{field}.function.arguments", self.function.arguments, "a JSON object, as text")
        return ToolCall(self.id, self.function.name, self.function.arguments or "{}")


class ToolFields(BaseModel):
    """Without `tool_choice` the model decides whether it calls any."""

    tools: Annotated[list[ToolField], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None

    @property
    def names_tool(self) -> bool:
        """Whether one function was chosen for the model."""
        return isinstance(self.tool_choice, ChosenTool)

    @property
    def chosen_index(self) -> int:
        """Which of `tools` is the first that the model may call."""
        name = self.tool_choice.function.name if isinstance(self.tool_choice, ChosenTool) else None
        return next((index for index, tool in enumerate(self.tools or ()) if tool.function.name == name), 0)

    def offered(self) -> tuple[Tool, ...]:
        """What the model may call. Raises InvalidArgument for tools that are none, and a choice of none of them."""
        tools = offered(self.tools or ())
        if self.tool_choice == "none":
            return ()
        if isinstance(self.tool_choice, ChosenTool):
            chosen = self.tool_choice.function.name
            tools = tuple(tool for tool in tools if tool.name == chosen)
            if not tools:
                raise InvalidArgument("tool_choice.function.name", chosen, "the name of one of `tools`")
        if self.tool_choice == "required" and not tools:
            raise InvalidArgument("tool_choice", "required", "none or auto where there are no tools")
        return tools

    def calls_structure(
        self, syntax: ToolSyntax, sign_id: int | None, asked: Structure | None, asked_field: str
    ) -> Structure | None:
        """What answers are held to: calls where they are asked for, and those of strict tools; else `asked`, what
        `asked_field` asks of an answer that calls nothing. Raises InvalidArgument for what does not go together."""
        tools, has_many = self.offered(), self.parallel_tool_calls is not False
        if not tools:
            return asked
        if self.tool_choice == "required" or self.names_tool:
            return calls_only(syntax, sign_id, tools, has_many=has_many and not self.names_tool)
        if asked is not None:
            if asked.kind != "json_schema" or not syntax.sign:
                raise InvalidArgument(asked_field, "a structure", "none where the model may call tools as well")
            schema = _schema(asked.text, asked_field)
            return object_or_calls(syntax, sign_id, _loosened(tools), schema, has_many=has_many)
        if not any(tool.is_strict for tool in tools):
            return None
        return text_or_calls(syntax, sign_id, _loosened(tools), has_many=has_many)


def offered(fields: Sequence[ToolField]) -> tuple[Tool, ...]:
    """Raises InvalidArgument for two of one name, and for parameters that are no object's."""
    tools: dict[str, Tool] = {}
    for index, function in enumerate(field.function for field in fields):
        where = f"tools[{index}].function"
        if function.name in tools:
            raise InvalidArgument(f"{where}.name", function.name, "a name that no other tool has")
        if function.parameters is not None and function.parameters.get("type", "object") != "object":
            raise InvalidArgument(f"{where}.parameters.type", function.parameters["type"], "object")
        tools[function.name] = Tool(function.name, function.description, function.parameters, bool(function.strict))
    return tuple(tools.values())


def _loosened(tools: Sequence[Tool]) -> tuple[Tool, ...]:
    """Those that are not strict may be called with any object."""
    return tuple(tool if tool.is_strict else replace(tool, parameters={}) for tool in tools)


def _schema(text: str, field: str) -> dict[str, Any]:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        schema = None
    if not isinstance(schema, dict):
        raise InvalidArgument(field, text, "a JSON schema, as an object")
    return schema
