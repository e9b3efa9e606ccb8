"""Calls of tools in answers: what is one, what is text, and that it makes no difference how an answer is cut up."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.openai.tool_reader import Arguments, CallBegins, Piece, ToolReader
from engine.tools import HERMES, LLAMA, MISTRAL, ToolSyntax

NAMES = frozenset({"add", "look up"})
SYNTAXES = {"hermes": HERMES, "mistral": MISTRAL, "llama": LLAMA}
TRICKY = json.dumps({"a": 'say "}"', "b": ["]", {"c": "\\"}], "d": "é\n{"})


def read(syntax: ToolSyntax, *texts: str) -> list[Piece]:
    """Pieces of one kind that follow each other as one."""
    reader = ToolReader(syntax, NAMES)
    pieces: list[Piece] = []
    for piece in [piece for text in texts for piece in reader.push(text)] + reader.end():
        match pieces[-1:], piece:
            case [[str() as last], str()]:
                pieces[-1] = last + piece
            case [[Arguments(text=last)], Arguments(text=text)]:
                pieces[-1] = Arguments(last + text)
            case _:
                pieces.append(piece)
    assert reader.has_called == any(isinstance(piece, CallBegins) for piece in pieces)
    return pieces


def written(syntax: ToolSyntax, *calls: tuple[str, str]) -> str:
    """As a model writes calls."""
    bodies = [
        f'{syntax.begin}{{"name": "{name}", "{syntax.arguments_key}": {arguments}}}{syntax.end}'
        for name, arguments in calls
    ]
    return syntax.opening + syntax.between.join(bodies) + syntax.closing


ONE = [CallBegins("add"), Arguments(TRICKY)]
ANSWERS: list[tuple[ToolSyntax, str, list[Piece]]] = [
    *((syntax, written(syntax, ("add", TRICKY)), ONE) for syntax in SYNTAXES.values()),
    *((syntax, "Just text, 1 < 2 [or {so}].\n", ["Just text, 1 < 2 [or {so}].\n"]) for syntax in SYNTAXES.values()),
    *(
        (syntax, written(syntax, ("add", TRICKY), ("look up", "{}")), [*ONE, CallBegins("look up"), Arguments("{}")])
        for syntax in (HERMES, MISTRAL)
    ),
    *((syntax, "I look.\n\n" + written(syntax, ("add", TRICKY)), ["I look.", *ONE]) for syntax in (HERMES, MISTRAL)),
    *((syntax, written(syntax, ("add", TRICKY)) + "\n", ONE) for syntax in SYNTAXES.values()),
    (HERMES, written(HERMES, ("add", "{}")) + " Done.", [CallBegins("add"), Arguments("{}"), " Done."]),
    # Not as it should be, yet clear.
    (HERMES, '<tool_call>{"name":"add","arguments":{"a":1}}</tool_call>', [CallBegins("add"), Arguments('{"a":1}')]),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>!', [*ONE[:1], Arguments('{"a": 1}'), "!"]),
    (LLAMA, ' {"parameters": {"a": 1}, "name": "add"}', [*ONE[:1], Arguments('{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "add"}</tool_call>', [CallBegins("add"), Arguments("{}")]),
    # Cut off.
    (HERMES, '<tool_call>\n{"name": "add", "arguments": {"a": "x\\', [CallBegins("add"), Arguments('{"a": "x')]),
    (HERMES, written(HERMES, ("add", "{}"))[:-5], [CallBegins("add"), Arguments("{}")]),
    (HERMES, '<tool_call>\n{"name": "add", "argu', ['<tool_call>\n{"name": "add", "argu']),
    (HERMES, "So <tool", ["So <tool"]),
    # No calls.
    *(
        (syntax, text, [text])
        for syntax, text in (
            (HERMES, 'So:\n <tool_call>\n{"name": "sub", "arguments": {}}\n</tool_call>'),
            (HERMES, "<tool_call>add(1)</tool_call> or not"),
            (HERMES, '<tool_call>{"name": "add", "arguments": [1]}</tool_call>'),
            (HERMES, '<tool_call>{"name": "\\x", "arguments": {}}</tool_call>'),
            (LLAMA, '{"answer": 42}'),
            (LLAMA, 'It is {"name": "add", "parameters": {}}'),
            (MISTRAL, '[{"name": "add", "arguments": {}}]'),
            (HERMES, " \n"),
        )
    ),
    (HERMES, "", []),
]


@pytest.mark.parametrize(("syntax", "answer", "pieces"), ANSWERS)
def test_calls_and_text(syntax: ToolSyntax, answer: str, pieces: list[Piece]) -> None:
    assert read(syntax, answer) == pieces
    assert read(syntax, *answer) == pieces, "character by character"
    for seed in range(20):
        rng = random.Random(seed)
        cuts = sorted(rng.choices(range(len(answer) + 1), k=3))
        parts = [answer[start:end] for start, end in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
        assert read(syntax, *parts) == pieces, parts


def test_arguments_are_passed_on_while_they_are_written() -> None:
    reader = ToolReader(HERMES, NAMES)
    assert reader.push('<tool_call>\n{"name": "add", "arg') == []
    assert reader.push('uments": {"a": "lo') == [CallBegins("add"), Arguments('{"a": "lo')]
    assert reader.push("ng") == [Arguments("ng")]
    assert reader.push('"}') == [Arguments('"}')]
    assert reader.push("}\n</tool") == []
    assert reader.push("_call>") == reader.end() == []


def test_text_is_held_back_no_longer_than_it_may_be_a_sign() -> None:
    reader = ToolReader(HERMES, NAMES)
    assert reader.push("Is 1 <") == ["Is 1"]
    assert reader.push(" 2?") == [" < 2?"]


SHARDS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", '{"name": "add", ', '"arguments": ', *'{}[]"\\, x']


@given(st.sampled_from(list(SYNTAXES)), st.lists(st.sampled_from(SHARDS), max_size=30), st.integers(1, 9))
def test_whatever_a_model_writes_is_read_the_same_however_it_comes(name: str, shards: list[str], size: int) -> None:
    answer = "".join(shards)
    parts = [answer[start : start + size] for start in range(0, len(answer), size)]
    whole = read(SYNTAXES[name], answer)
    assert read(SYNTAXES[name], *parts) == whole
    if not any(isinstance(piece, CallBegins) for piece in whole):
        assert "".join(map(str, whole)).split() == answer.split(), "nothing of a text is lost"
