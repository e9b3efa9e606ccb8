"""Tools: how models are told of them, and grammars that make answers call them."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest

from cluster.openai.tool_reader import Arguments, CallBegins, ToolReader
from engine.chat_template import ChatTemplate
from engine.guidance import Guides, check_structure
from engine.structure import Structure
from engine.tool_grammar import calls_only, object_or_calls, text_or_calls
from engine.tools import HERMES, LLAMA, MISTRAL, Tool, ToolCall, ToolSyntax
from tests.engine.ascii_tokenizer import END, ascii_tokenizer

TOKENIZER = ascii_tokenizer("[TOOL_CALLS]")
ADD = Tool(
    "add",
    "Adds two numbers.",
    {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/Digit"}, "b": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
        "$defs": {"Digit": {"type": "integer", "minimum": 0, "maximum": 9}},
    },
    is_strict=True,
)
STOP = Tool('stop "it"')
TOOLS = (ADD, STOP)
SCHEMAS: dict[str, Any] = {"add": ADD.parameters, STOP.name: {"type": "object", "maxProperties": 0}}
SIGN_ID = TOKENIZER.special_id("[TOOL_CALLS]")
SYNTAXES = {"hermes": (HERMES, None), "mistral": (MISTRAL, SIGN_ID), "llama": (LLAMA, None)}


def walk(structure: Structure, begins: str, seed: int) -> str:
    """An answer that begins so, and goes on with any of what is allowed."""
    check_structure(structure)
    guides = Guides(TOKENIZER, TOKENIZER.vocab_size, (END,))
    rng, output = random.Random(seed), TOKENIZER.encode(begins)
    for length in range(len(output)):
        assert not guides.banned(structure, output[:length])[output[length]], TOKENIZER.decode(output[:length])
    while not output or output[-1] != END:
        output.append(rng.choice(np.flatnonzero(~guides.banned(structure, output)).tolist()))
        assert len(output) < 2000, "some end is always near enough"
    return TOKENIZER.decode(output[:-1], skip_special_tokens=False)


def calls(syntax: ToolSyntax, answer: str) -> tuple[str, list[tuple[str, Any]]]:
    """An answer's text and calls, each of which is valid."""
    reader = ToolReader(syntax, set(SCHEMAS))
    text, found = "", list[list[str]]()
    for piece in [*reader.push(answer), *reader.end()]:
        match piece:
            case CallBegins(name=name):
                found.append([name, ""])
            case Arguments(text=more):
                found[-1][1] += more
            case _:
                text += piece
    for name, arguments in found:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])
    return text, [(name, json.loads(arguments)) for name, arguments in found]


@pytest.mark.parametrize("name", SYNTAXES)
def test_who_must_call_calls_with_valid_arguments(name: str) -> None:
    syntax, sign_id = SYNTAXES[name]
    seen = set()
    for seed in range(30):
        text, found = calls(syntax, walk(calls_only(syntax, sign_id, TOOLS, has_many=True), "", seed))
        assert (text, bool(found)) == ("", True)
        seen |= {name for name, _ in found}
        text, found = calls(syntax, walk(calls_only(syntax, sign_id, (ADD,), has_many=False), "", seed))
        assert (text, [name for name, _ in found]) == ("", ["add"])
    assert seen == set(SCHEMAS)


@pytest.mark.parametrize("name", SYNTAXES)
def test_names_are_written_as_they_are(name: str) -> None:
    """Characters outside ASCII, too: models write no escapes for them. The reader takes either."""
    syntax, sign_id = SYNTAXES[name]
    structure = calls_only(syntax, sign_id, (Tool("größe"),), has_many=False)
    check_structure(structure)
    assert "größe" in structure.text
    for written in ('"größe"', '"gr\\u00f6\\u00dfe"'):
        call = f'{{"name": {written}, "{syntax.arguments_key}": {{}}}}'
        reader = ToolReader(syntax, {"größe"})
        pieces = reader.push(f"{syntax.opening}{syntax.begin}{call}{syntax.end}{syntax.closing}")
        assert [*pieces, *reader.end()] == [CallBegins("größe"), Arguments("{}")]


@pytest.mark.parametrize("name", ["hermes", "mistral"])
def test_several_calls_may_follow_a_text(name: str) -> None:
    syntax, sign_id = SYNTAXES[name]
    one = '{"name": "add", "arguments": {"a": 1}}'
    begins = f"I add. {syntax.opening}{syntax.begin}{one}{syntax.end}{syntax.between}"
    for seed in range(10):
        text, found = calls(syntax, walk(text_or_calls(syntax, sign_id, TOOLS, has_many=True), begins, seed))
        assert text == "I add."
        assert found[0] == ("add", {"a": 1})
        assert len(found) > 1
    with pytest.raises(AssertionError, match=r"I add\. "):
        walk(text_or_calls(syntax, sign_id, TOOLS, has_many=False), begins, 0)


@pytest.mark.parametrize("name", SYNTAXES)
def test_who_may_call_may_as_well_say_anything(name: str) -> None:
    syntax, sign_id = SYNTAXES[name]
    answer = walk(text_or_calls(syntax, sign_id, TOOLS, has_many=True), "Well, { <tool ", 1)
    assert calls(syntax, answer)[0].startswith("Well, { <tool ")


def test_an_object_or_a_call() -> None:
    properties = {"ok": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": ["ok"], "additionalProperties": False}
    structure = object_or_calls(HERMES, None, TOOLS, schema, has_many=False)
    assert json.loads(walk(structure, "{", 1)) in ({"ok": True}, {"ok": False})
    assert calls(HERMES, walk(structure, "<", 1))[1]


# ── prompts ──────────────────────────────────────────────────────────────────────────────────────────────────────────

PLAIN = "{% for m in messages %}§{{ m.role }}]{{ m.content }}{% endfor %}"
CHAT = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "", "tool_calls": [ToolCall("c1", "add", '{"a": 1}').described()]},
    {"role": "tool", "content": "2", "tool_call_id": "c1"},
    {"role": "tool", "content": "or 3", "tool_call_id": "c2"},
]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {}, "model")


def test_a_template_that_knows_tools_gets_them_as_they_are() -> None:
    source = (
        "{% if tools %}<tool_call> as in {{ tools | tojson }}{% endif %}"
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
        "{{ m.tool_call_id or '' }}{% endfor %}"
    )
    known = template(source)
    assert known.tool_syntax is HERMES
    turns = '[user]1+1?[assistant]add{"a": 1}[tool]2c1[tool]or 3c2'
    assert known.render(CHAT, tools=TOOLS[:1]) == f"<tool_call> as in {json.dumps([ADD.described()])}{turns}"
    assert known.render(CHAT) == turns


@pytest.mark.parametrize(
    ("source", "syntax"),
    [
        ("{% if tools %}[TOOL_CALLS]{% endif %}", MISTRAL),
        ("{% if tools %}{\"name\": function, \"parameters\": its arguments}{% endif %}", LLAMA),
        ("{% if tools %}call them as you please{% endif %}", HERMES),
        ("<tool_call> [TOOL_CALLS]", HERMES),
    ],
)  # fmt: skip
def test_the_way_to_write_calls_is_the_templates(source: str, syntax: ToolSyntax) -> None:
    assert template(source).tool_syntax is syntax


@pytest.mark.parametrize("source", [PLAIN, PLAIN + "{% if tools %}call them as you please{% endif %}"])
def test_other_templates_are_told_in_turns_that_they_know(source: str) -> None:
    text = template(source).render(CHAT, tools=TOOLS)
    system, user, assistant, tools = text.removeprefix("§").split("§")
    assert system.startswith("system]")
    assert json.dumps(ADD.described()) in system
    assert (user, assistant) == (
        "user]1+1?",
        'assistant]<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
    )
    assert tools == "user]<tool_response>\n2\n</tool_response>\n<tool_response>\nor 3\n</tool_response>"
    assert "as you please" not in text


def test_a_system_turn_keeps_its_words() -> None:
    text = template(PLAIN).render([{"role": "system", "content": "Be brief."}, *CHAT[:1]], tools=TOOLS)
    assert text.startswith("§system]Be brief.\n\nYou may call")
    assert text.count("§system]") == 1
    assert template(PLAIN).render(CHAT[:1]) == "§user]1+1?", "nobody is told of no tools"
