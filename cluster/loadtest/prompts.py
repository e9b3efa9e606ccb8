"""Where a load's prompts come from: random token ids, random words, or a file of real ones.

No prompt comes twice, because a prefix cache would answer the second one faster; only a trace's prefix hashes make
prompts begin alike, by as many tokens as the trace says.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from cluster.loadtest.request import Chat, Prompt
from cluster.planning.trace import PREFIX_BLOCK_TOKENS
from cluster.prompt_file import PromptLine
from engine.errors import ConfigError

# The ids of special tokens lie at either end of a vocabulary.
SKIPPED_LOW = 1000
SKIPPED_HIGH_SHARE = 0.05
# For servers that do not tell their vocabulary: ids that every model of 32,000 tokens and more has.
COMMON_VOCABULARY = 32_000
# Common words: with the space before it, each is one token of SmolLM2, and of most vocabularies.
_TEXT = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power
hour game line end member law car city community name president team minute idea body information back parent face
others level office door health person art war history party result change morning reason research moment air teacher
force education foot boy age policy music market sense nation plan college interest
"""
WORDS = tuple(_TEXT.split())


class PromptSource(Protocol):
    """`tokens` is the length to make, `prefix_hashes` what to share (see cluster/planning/trace.py), `rng` draws the
    rest. Returns the prompt and its tokens, 0 where only the server can count them."""

    def prompt(self, tokens: int, prefix_hashes: Sequence[int], rng: random.Random) -> tuple[Prompt, int]: ...


class RandomTokens:
    """Prompts of exactly as many tokens as asked for, as token ids of a vocabulary."""

    def __init__(self, vocab_size: int | None) -> None:
        size = vocab_size or COMMON_VOCABULARY
        self._ids = range(min(SKIPPED_LOW, size // 10), max(1, size - int(SKIPPED_HIGH_SHARE * size)))

    def prompt(self, tokens: int, prefix_hashes: Sequence[int], rng: random.Random) -> tuple[Prompt, int]:
        return _in_blocks(self._ids, tokens, prefix_hashes, rng), tokens


class RandomWords:
    """Text of as many common words as tokens are asked for: within a few per cent of them, by most tokenizers."""

    def prompt(self, tokens: int, prefix_hashes: Sequence[int], rng: random.Random) -> tuple[Prompt, int]:
        chosen = _in_blocks(range(len(WORDS)), tokens, prefix_hashes, rng)
        return " ".join(WORDS[index] for index in chosen), 0


class FilePrompts:
    """The lines of a prompt file, in an order drawn anew for each round through it. From the second round on, each
    prompt has its number in front, so that it is not the same as before; with a `mark` all have, behind the mark, so
    that they differ from those of other marks too."""

    def __init__(self, lines: Sequence[PromptLine], rng: random.Random, mark: str = "") -> None:
        if not lines:
            raise ConfigError("--prompts: holds no prompt")
        self._lines = list(lines)
        self._rng, self._mark = rng, mark
        self._given = 0
        self._order: list[PromptLine] = []

    def prompt(self, tokens: int, prefix_hashes: Sequence[int], rng: random.Random) -> tuple[Prompt, int]:
        """`tokens`, `prefix_hashes` and `rng` are not read: the file says what the prompts are."""
        if not self._order:
            self._order = self._rng.sample(self._lines, len(self._lines))
        line = self._order.pop()
        if self._mark or self._given >= len(self._lines):
            line = replace(line, prompt=_marked(line.prompt, f"{self._mark} {self._given}".strip()))
        self._given += 1
        return line.prompt, 0


def _in_blocks(items: range, tokens: int, prefix_hashes: Sequence[int], rng: random.Random) -> tuple[int, ...]:
    """`tokens` of `items`: a block per hash, the same for equal hashes; without hashes drawn from `rng`."""
    if not prefix_hashes:
        return tuple(rng.choices(items, k=tokens))
    drawn: list[int] = []
    for name in prefix_hashes:
        drawn += random.Random(f"block {name}").choices(items, k=PREFIX_BLOCK_TOKENS)
    return tuple(drawn[:tokens])


def _marked(prompt: Prompt, mark: str) -> Prompt:
    if isinstance(prompt, str):
        return f"({mark}) {prompt}"
    turns: Chat = tuple(turn for turn in prompt if isinstance(turn, tuple))
    if turns:
        return ((turns[0][0], f"({mark}) {turns[0][1]}"), *turns[1:])
    # A digit a token: every vocabulary has ten.
    digits = str(zlib.crc32(mark.encode()))
    return tuple([int(digit) for digit in digits] + [item for item in prompt if isinstance(item, int)])
