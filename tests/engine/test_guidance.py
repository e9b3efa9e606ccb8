"""Answers that are held to a structure: whatever is drawn of what is allowed, they are right in the end."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable

import jsonschema
import numpy as np
import pytest

from engine.errors import InvalidArgument, ModelFileError
from engine.guidance import MATCHERS_KEPT, Guides, LazyGuides, check_structure
from engine.structure import MAX_STRUCTURE_CHARS, Structure
from tests.engine.ascii_tokenizer import END, ascii_tokenizer

TOKENIZER = ascii_tokenizer()
VOCAB = TOKENIZER.vocab_size
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "size": {"type": "integer", "minimum": 3, "maximum": 120},
        "kind": {"enum": ["a", "bc"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "size"],
    "additionalProperties": False,
}


def guides() -> Guides:
    return Guides(TOKENIZER, VOCAB, (END,))


def walk(made: Guides, structure: Structure, rng: random.Random, longest: int = 400) -> list[int]:
    """Draws any of what is allowed until the end."""
    output: list[int] = []
    while len(output) < longest:
        allowed = np.flatnonzero(~made.banned(structure, output)).tolist()
        assert allowed, "there is always something to draw"
        output.append(rng.choice(allowed))
        if output[-1] == END:
            return output
    raise AssertionError(f"no end: {TOKENIZER.decode(output)}")


def is_of_schema(text: str) -> bool:
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


STRUCTURES: dict[str, tuple[Structure, Callable[[str], object]]] = {
    "schema": (Structure("json_schema", json.dumps(SCHEMA)), is_of_schema),
    "regex": (
        Structure("regex", "[A-C]{2}-[0-9]{1,3}(x|yz)"),
        lambda text: re.fullmatch("[A-C]{2}-\\d{1,3}(x|yz)", text),
    ),
    "choice": (Structure("choice", json.dumps(["red", 're"d', "a\\b"])), lambda text: text in ("red", 're"d', "a\\b")),
    "lark": (Structure("grammar", 'start: "a" ("b" | "c")~1..3 "d"'), lambda text: re.fullmatch("a[bc]{1,3}d", text)),
    "gbnf": (Structure("grammar", 'root ::= "yes" | "no" root2\nroot2 ::= "!"'), lambda text: text in ("yes", "no!")),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_any_walk_is_right(name: str) -> None:
    structure, is_right = STRUCTURES[name]
    check_structure(structure)
    made, rng = guides(), random.Random(1)
    for _ in range(50):
        output = walk(made, structure, rng)
        assert is_right(TOKENIZER.decode(output)), TOKENIZER.decode(output)


@pytest.mark.parametrize("name", STRUCTURES)
def test_what_is_allowed_depends_on_the_tokens_alone(name: str) -> None:
    """Another worker, which has seen none of it, goes on in the same way."""
    structure, _ = STRUCTURES[name]
    first = guides()
    output = walk(first, structure, random.Random(2))
    for length in range(len(output)):
        assert (guides().banned(structure, output[:length]) == first.banned(structure, output[:length])).all()


def test_answers_that_are_alike_do_not_disturb_each_other() -> None:
    structure = STRUCTURES["schema"][0]
    made = guides()
    answers = [walk(guides(), structure, random.Random(seed)) for seed in range(8)]
    for step in range(max(map(len, answers))):
        for answer in answers:
            if step < len(answer):
                assert not made.banned(structure, answer[:step])[answer[step]]


def test_an_answer_that_was_forgotten_is_worked_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.guidance.MATCHERS_KEPT", 1)
    monkeypatch.setattr("engine.guidance.GRAMMARS_KEPT", 1)
    made = guides()
    for name in STRUCTURES:
        structure, _ = STRUCTURES[name]
        output = walk(guides(), structure, random.Random(3))
        for length in range(len(output)):
            made.banned(STRUCTURES["regex"][0], ())
            assert not made.banned(structure, output[:length])[output[length]]
    assert MATCHERS_KEPT > 1


def test_what_breaks_the_structure_can_only_end() -> None:
    banned = guides().banned(STRUCTURES["regex"][0], TOKENIZER.encode("zz"))
    assert np.flatnonzero(~banned).tolist() == [END]


def test_tokens_beyond_the_tokenizers_are_never_drawn() -> None:
    wide = Guides(TOKENIZER, VOCAB + 31, (END,))
    banned = wide.banned(Structure("regex", "(.|\n)*"), ())
    assert banned.shape == (VOCAB + 31,)
    assert banned[VOCAB:].all()
    assert not banned[:VOCAB].any()


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (Structure("json_schema", "{"), "expected a JSON schema: EOF"),
        (Structure("json_schema", '{"type": "nope"}'), "expected a JSON schema: "),
        (Structure("json_schema", '{"$ref": "http://elsewhere/schema"}'), "expected a JSON schema: "),
        (Structure("regex", "(a"), "expected a regular expression: "),
        (Structure("choice", "[]"), "expected a JSON list of texts: "),
        (Structure("choice", '["a", 5]'), "expected a JSON list of texts: "),
        (Structure("choice", '"a"'), "expected a JSON list of texts: "),
        (Structure("grammar", 'start: "a" other'), "expected a grammar in Lark's notation or in GBNF: "),
        (Structure("yaml", "a"), "structure.kind: got 'yaml', expected one of json_schema, regex, choice, grammar"),
        (Structure("regex", ""), "got '0 characters', expected 1 to 65536 characters"),
        (Structure("regex", "a" * (MAX_STRUCTURE_CHARS + 1)), "expected 1 to 65536 characters"),
    ],
)
def test_structures_that_are_none(structure: Structure, message: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        check_structure(structure)
    assert raised.value.field.startswith("sampling_params.structure")
    assert message in str(raised.value)


def test_guides_that_are_made_meanwhile() -> None:
    lazy = LazyGuides(guides)
    assert lazy.is_there
    structure = STRUCTURES["regex"][0]
    assert (lazy.banned(structure, ()) == guides().banned(structure, ())).all()
    assert lazy.is_there


def test_a_model_without_a_tokenizer_has_none() -> None:
    def make() -> Guides:
        raise ModelFileError("tokenizer.json", "is missing")

    lazy = LazyGuides(make)
    lazy._thread.join()
    assert not lazy.is_there
