"""Holds answers to a structure: says after every token which ones may come next.

    structure ─▶ grammar ─▶ matcher, fed with the answer so far ─▶ mask of the tokens that would break it

What may come next depends on the structure and the tokens so far alone. So the first token may be drawn on one worker
and the rest on another, or on a third one after that was lost: each works out where the answer is by itself. Matchers
are kept as long as there is room, so that this mostly means to feed one token. The parser is llguidance's
(https://github.com/guidance-ai/llguidance).
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, grammar_from

from engine.detokenizer import token_bytes
from engine.errors import InvalidArgument, TandemError
from engine.structure import JSON_LAYOUT, Mask, Structure
from engine.tokenizer import Tokenizer

# Grammars that are ready to begin, and answers under way.
GRAMMARS_KEPT = 128
MATCHERS_KEPT = 1024
# Items of the parser that one token may lead to. All other answers of a step wait for it, and with llguidance's own
# 50,000 an ambiguous grammar takes seconds. Of 160 real tool schemas none comes near this.
MAX_STEP_ITEMS = 1000
# Messages come without the state of the parser.
LIMITS = LLParserLimits(step_max_items=MAX_STEP_ITEMS, verbose_errors=False)


def check_structure(structure: Structure, field: str = "sampling_params.structure") -> None:
    """Raises InvalidArgument for a text that is no such structure, or one that is too large to be held to."""
    structure.validate()
    if problem := LLMatcher.validate_grammar(_grammar(structure, field), limits=LIMITS):
        raise InvalidArgument(field, structure.text, f"{_EXPECTED[structure.kind]}: {_one_line(problem)}")


class Guides:
    """For the tokens of one model: `vocab_size` logits, `eos_token_ids` of which end an answer. For one thread at a
    time."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        assert eos_token_ids, "nothing could end an answer"
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._tokens = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, vocab_size, eos_token_ids)), vocab_size)
        self._grammars: OrderedDict[Structure, LLMatcher] = OrderedDict()
        self._places: OrderedDict[tuple[Structure, tuple[int, ...]], _Place] = OrderedDict()

    @property
    def is_there(self) -> bool:
        return True

    def banned(self, structure: Structure, output_ids: Sequence[int]) -> Mask | None:
        """The tokens that may not come after `output_ids`: [vocab_size], True for those. Where nothing may come but the
        end, all but the end tokens. None where nobody can tell: the text is no such structure or names a token that the
        model lacks, `output_ids` break it, or the parser has met a limit."""
        try:
            matcher = self._at(structure, tuple(output_ids))
        except InvalidArgument:
            return None
        banned = np.ones(self._vocab_size, dtype=np.bool_)
        if not matcher.is_stopped():
            bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
            banned = np.unpackbits(bits, count=self._vocab_size, bitorder="little") == 0
        if matcher.is_accepting():
            banned[self._eos_token_ids] = False
        # A limit may have been met just now. And a vocabulary may have no token for what has to come.
        return None if matcher.is_error() or banned.all() else banned

    def _at(self, structure: Structure, output_ids: tuple[int, ...]) -> LLMatcher:
        """Where an answer is. Raises InvalidArgument for a text that is no such structure."""
        place = self._places.get((structure, output_ids))
        if place is None:
            place = _Place(self._next(structure, output_ids))
            self._places[structure, output_ids] = place
            if len(self._places) > MATCHERS_KEPT:
                self._places.popitem(last=False)
        place.answers += 1
        self._places.move_to_end((structure, output_ids))
        return place.matcher

    def _next(self, structure: Structure, output_ids: tuple[int, ...]) -> LLMatcher:
        before = self._places.get((structure, output_ids[:-1])) if output_ids else None
        if before is None:
            matcher = self._begin(structure)
            matcher.consume_tokens(list(output_ids))
            return matcher
        before.answers -= 1
        if before.answers:
            matcher = before.matcher.deep_copy()
        else:
            matcher = self._places.pop((structure, output_ids[:-1])).matcher
        matcher.consume_token(output_ids[-1])
        return matcher

    def _begin(self, structure: Structure) -> LLMatcher:
        first = self._grammars.get(structure)
        if first is None:
            first = LLMatcher(self._tokens, _grammar(structure, "structure"), log_level=0, limits=LIMITS)
            self._grammars[structure] = first
            if len(self._grammars) > GRAMMARS_KEPT:
                self._grammars.popitem(last=False)
        self._grammars.move_to_end(structure)
        return first.deep_copy()


class LazyGuides:
    """Guides that are made in a thread, from now on: reading a vocabulary takes a second or two, which a worker that
    starts need not wait for."""

    def __init__(self, make: Callable[[], Guides]) -> None:
        self._make = make
        self._made: Guides | None = None
        self._thread = threading.Thread(target=self._run, name="guides", daemon=True)
        self._thread.start()

    @property
    def is_there(self) -> bool:
        """False once it is known that there are none: the model's files hold no tokenizer."""
        return self._thread.is_alive() or self._made is not None

    def banned(self, structure: Structure, output_ids: Sequence[int]) -> Mask | None:
        """As Guides.banned. Waits until they are made."""
        self._thread.join()
        assert self._made is not None, "a structure was taken where no tokenizer is"
        return self._made.banned(structure, output_ids)

    def _run(self) -> None:
        try:
            self._made = self._make()
        except TandemError:
            # What needs a tokenizer is refused then.
            self._made = None


@dataclass(slots=True)
class _Place:
    """Where `answers` of those under way are, which are alike so far."""

    matcher: LLMatcher
    answers: int = 0


class _Vocabulary:
    """What llguidance wants to know of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_ids[0]
        self.bos_token_id = tokenizer.bos_token_id
        known = min(vocab_size, tokenizer.vocab_size)
        self.tokens = [token_bytes(tokenizer, token_id) for token_id in range(known)] + [b""] * (vocab_size - known)
        # An end token is no text, whether the tokenizer says so or not: within an answer it would end it.
        special = tokenizer.special_token_ids | set(eos_token_ids)
        self.special_token_ids = sorted(token_id for token_id in special if token_id < vocab_size)

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


_EXPECTED = {
    "json_schema": "a JSON schema",
    "regex": "a regular expression",
    "choice": "a JSON list of texts",
    "grammar": "a grammar in Lark's notation or in GBNF",
}


def _grammar(structure: Structure, field: str) -> str:
    try:
        if structure.kind == "json_schema":
            return LLMatcher.grammar_from_json_schema(structure.text, defaults=JSON_LAYOUT)  # type: ignore[arg-type]
        if structure.kind == "choice":
            return grammar_from("choice", _texts(structure.text))
        return grammar_from("regex" if structure.kind == "regex" else "grammar", structure.text)
    except ValueError as error:
        raise InvalidArgument(field, structure.text, f"{_EXPECTED[structure.kind]}: {_one_line(str(error))}") from None


def _texts(text: str) -> str:
    """Checks what llguidance takes on trust."""
    found = json.loads(text)
    if not isinstance(found, list) or not found or not all(isinstance(each, str) and each for each in found):
        raise ValueError("it is none, or one of other things")
    return text


def _one_line(problem: str) -> str:
    return " ".join(problem.split())[:200]
