"""Answers that are held to a structure: whatever is drawn of what is allowed, they are right in the end."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher

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
        banned = made.banned(structure, output)
        assert banned is not None, "it can be followed"
        allowed = np.flatnonzero(~banned).tolist()
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


# Each with an answer after which nobody can tell what may come next.
LOST = {
    "a token that is none": (Structure("grammar", 'start: <|nope|> "a"'), ""),
    "a token beyond the vocabulary": (Structure("grammar", 'start: <[999999]> "a"'), ""),
    "characters that no token has": (Structure("regex", "é"), ""),
    "an ambiguous grammar": (Structure("grammar", 'start: "(" a ")"\na: a a | "x" | "y"'), "(" + "x" * 400),
    "an answer that is none": (STRUCTURES["regex"][0], "zz"),
    "no schema": (Structure("json_schema", "{"), ""),
}


@pytest.mark.parametrize("name", LOST)
def test_what_cannot_be_held_to_its_structure_does_not_look_complete(name: str) -> None:
    structure, so_far = LOST[name]
    made, output = guides(), TOKENIZER.encode(so_far)
    # From its beginning, and step by step.
    assert made.banned(structure, output) is None
    assert any(made.banned(structure, output[:length]) is None for length in range(len(output) + 1))
    # Others are not disturbed.
    assert walk(made, STRUCTURES["choice"][0], random.Random(4))


def test_one_step_of_an_ambiguous_grammar_is_bounded() -> None:
    """All other answers of the step wait for it. Without the bound 600 tokens are taken, and take 10 s."""
    structure, so_far = LOST["an ambiguous grammar"]
    made, output = guides(), TOKENIZER.encode(so_far)
    taken = next(length for length in range(len(output) + 1) if made.banned(structure, output[:length]) is None)
    assert 50 < taken < 300


def test_answers_that_are_alike_share_one_parser() -> None:
    """To work out each from its beginning takes the longer, the further they are: for ambiguous grammars, seconds."""
    begins = 0

    class Counting(Guides):
        def _begin(self, structure: Structure) -> LLMatcher:
            nonlocal begins
            begins += 1
            return super()._begin(structure)

    structure = Structure("regex", "[a-z]*")
    made, common = Counting(TOKENIZER, VOCAB, (END,)), TOKENIZER.encode("abcdefgh")
    ways = [[*common, *TOKENIZER.encode(rest)] for rest in ("xxxx", "xxxx", "yyyy", "xyxy", "zzzz")]
    for length in range(len(ways[0]) + 1):
        for way in ways:
            mask = made.banned(structure, way[:length])
            assert mask is not None
            assert not mask[way[length] if length < len(way) else END]
    assert begins == 1


def test_an_end_token_that_is_not_marked_special_is_no_text() -> None:
    """Some models have several, of which the tokenizer's file marks only one."""
    tokenizer = ascii_tokenizer(plain=("<eot>",))
    eot = END + 1
    for ends in ((END, eot), (eot, END)):
        made = Guides(tokenizer, tokenizer.vocab_size, ends)
        banned = made.banned(Structure("json_schema", '{"type": "string"}'), tokenizer.encode('"ab'))
        assert banned is not None
        assert banned[[END, eot]].all()


def test_tokens_beyond_the_tokenizers_are_never_drawn() -> None:
    wide = Guides(TOKENIZER, VOCAB + 31, (END,))
    banned = wide.banned(Structure("regex", "(.|\n)*"), ())
    assert banned is not None
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
