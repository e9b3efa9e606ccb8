"""A model's chat template: messages in, the prompt's text out.

The template is Jinja from the model's files, so it is input, not code of ours: it runs in Jinja's immutable sandbox.
What it may call (tojson, raise_exception, strftime_now, loop controls, {% generation %}) is what transformers offers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from engine.errors import InvalidArgument, ModelFileError
from engine.tools import HERMES, Tool, syntax_of, told_of

# What a template sees as today unless the caller says otherwise: equal requests give equal prompts on any day.
FIXED_NOW = datetime(2025, 1, 1)
# What a template can raise besides Jinja's own errors when it computes with messages that it did not expect.
TEMPLATE_FAULTS = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)


class ChatTemplate:
    """Compiled once. `special_tokens` are names that the template may use, such as bos_token → "<s>".
    `tool_syntax` is how the model is to write calls of tools."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], where: str) -> None:
        """`where` names the file in errors. Raises ModelFileError for a template that cannot be parsed."""
        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            environment = _environment()
            self._template = environment.from_string(source)
            takes_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelFileError(where, f"its chat template is not valid Jinja: {error}") from error
        own = syntax_of(source) if takes_tools else None
        self.tool_syntax = own or HERMES
        self._knows_tools = own is not None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        now: datetime = FIXED_NOW,
        add_generation_prompt: bool = True,
        tools: Sequence[Tool] = (),
    ) -> str:
        """The prompt's text, special tokens spelled out. `messages` may have OpenAI's `tool_calls` and `tool_call_id`.
        Raises InvalidArgument for messages it cannot take."""
        check_messages(messages)
        turns = [dict(message) for message in messages] if self._knows_tools else told_of(tools, messages)
        try:
            return self._template.render(
                self._special_tokens,
                messages=turns,
                tools=[tool.described() for tool in tools] if tools and self._knows_tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=now.strftime,
            )
        except TEMPLATE_FAULTS as error:
            raise InvalidArgument(
                "messages", [message["role"] for message in messages], f"what the model's chat template takes: {error}"
            ) from error


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises InvalidArgument unless there is at least one message and each has a role and a content, both strings."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise InvalidArgument("messages", messages, "a list of at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InvalidArgument(f"messages[{index}]", message, "a mapping with role and content")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise InvalidArgument(f"messages[{index}].{key}", message.get(key), "a string")
        if not message["role"]:
            raise InvalidArgument(f"messages[{index}].role", "", "a role such as 'user'")


class _GenerationBlock(Extension):
    """{% generation %} … {% endgeneration %} marks an answer for training. Here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _PlainNamespace(Namespace):
    """Jinja's namespace without names that start with an underscore: Python gives some of those a meaning."""

    def __init__(self, /, *args: Any, **names: Any) -> None:  # noqa: ANN401 - a template's own values
        _check_names(dict(*args, **names))
        super().__init__(*args, **names)

    def __setitem__(self, name: str, value: Any) -> None:  # noqa: ANN401 - a template's own value
        _check_names({name: value})
        super().__setitem__(name, value)


def _check_names(names: Mapping[Any, Any]) -> None:
    for name in names:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace of a chat template may not hold {name!r}")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
    )
    environment.filters["tojson"] = _tojson
    # A plain function and not the class: a template must not reach the class's attributes.
    environment.globals.update(raise_exception=_raise_exception, dict=_new_dict, namespace=_PlainNamespace)
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _new_dict(*args: Any, **values: Any) -> dict[Any, Any]:  # noqa: ANN401
    return dict(*args, **values)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which would put \\u003c into prompts.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
