"""Builds a `tokenizers` pipeline from the vocabulary that a GGUF file carries.

Two kinds cover the Llama family:

    gpt2     byte-level BPE: the text is split by a regular expression (`tokenizer.ggml.pre` names it), each piece is
             spelled in an alphabet of 256 characters, one per byte, and merged by the listed merges
    llama    SentencePiece BPE: spaces become ▁, the whole text is merged by score, unknown characters become bytes

How a file's keys are read follows llama.cpp and, where the two differ, transformers' reading of the same file, which is
what the golden tests compare with. So "smollm" splits like GPT-2: llama.cpp first sets every digit apart, which gives
other ids only for several spaces in front of a digit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from engine.fields import Fields

_ENGLISH_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PUNCTUATION_AND_SPACE = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _ENGLISH_SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _PUNCTUATION_AND_SPACE
_QWEN2 = _ENGLISH_SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _PUNCTUATION_AND_SPACE
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Name in the file → regular expression that splits the text. None is GPT-2's, built into the tokenizers package.
SPLITS: dict[str, str | None] = {
    "default": None,
    "gpt-2": None,
    "gpt2": None,
    "smollm": None,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
# These vocabularies take a piece that is a token as it stands, even where no sequence of merges leads to it.
WHOLE_PIECES_FIRST = frozenset({"llama-bpe", "llama3", "llama-v3", "tekken"})
ADDS_BOS_BY_DEFAULT = frozenset({"llama-bpe", "llama3", "llama-v3", "tekken"})
SPACE = "▁"


class TokenType(IntEnum):
    """What `tokenizer.ggml.token_type` says of a token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """Tokens with a part to play: `first` and `last` go around every text, any of `eos` ends an answer."""

    bos: int | None
    eos: tuple[int, ...]
    first: tuple[int, ...]
    last: tuple[int, ...]


def build(metadata: Mapping[str, Any], where: str) -> tuple[Tokenizer, SpecialIds]:
    """The pipeline that `metadata` (all of a GGUF file's key-value pairs) describes. Raises ModelFileError."""
    fields = Fields(metadata, where)
    kind = fields.choice("tokenizer.ggml.model", ("gpt2", "llama"))
    tokens = fields.values.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise fields.error("tokenizer.ggml.tokens is missing or not a list of strings")
    types = _per_token(fields, "tokenizer.ggml.token_type", len(tokens)) or [TokenType.NORMAL] * len(tokens)
    tokenizer = _byte_level(fields, tokens) if kind == "gpt2" else _sentencepiece(fields, tokens, types)
    tokenizer.add_special_tokens(_added(tokens, types, TokenType.CONTROL))
    tokenizer.add_tokens(_added(tokens, types, TokenType.USER_DEFINED))
    return tokenizer, _special_ids(fields, len(tokens))


def _byte_level(fields: Fields, tokens: Sequence[str]) -> Tokenizer:
    pre = _pre(fields)
    merges = _merges(fields, tokens)
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in WHOLE_PIECES_FIRST))
    split = SPLITS[pre]
    if split is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre(fields: Fields) -> str:
    if fields.values.get("tokenizer.ggml.pre") is None:
        return "default"
    return fields.choice("tokenizer.ggml.pre", tuple(SPLITS))


def _merges(fields: Fields, tokens: Sequence[str]) -> list[tuple[str, str]]:
    lines = fields.values.get("tokenizer.ggml.merges")
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise fields.error("tokenizer.ggml.merges is missing or not a list of strings")
    known = set(tokens)
    merges = []
    for line in lines:
        left, _, right = line.partition(" ")
        if not {left, right, left + right} <= known:
            raise fields.error(f"corrupt: merge {line!r} is not made of tokens of the vocabulary")
        merges.append((left, right))
    return merges


def _sentencepiece(fields: Fields, tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    scores = _per_token(fields, "tokenizer.ggml.scores", len(tokens))
    if scores is None:
        raise fields.error("tokenizer.ggml.scores is missing")
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.UNKNOWN), None)
    merges = merges_from_scores(tokens, types, scores)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = fields.flag("tokenizer.ggml.add_space_prefix", default=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=SPACE, prepend_scheme="first" if prefix else "never", split=False
    )
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def merges_from_scores(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Merges, best first, that give what SentencePiece's search by score gives.

    A piece can be made from any two pieces that spell it. Of pairs that spell the same piece those with longer parts
    come first, as in transformers.
    """
    textual = (TokenType.NORMAL, TokenType.USER_DEFINED)
    score_of = {token: score for token, kind, score in zip(tokens, types, scores, strict=True) if kind in textual}
    id_of = {token: token_id for token_id, token in enumerate(tokens)}
    ranked = []
    for token, score in score_of.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in score_of and right in score_of:
                ranked.append((-score, -len(left), -len(right), id_of[token], id_of[left], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _per_token(fields: Fields, key: str, count: int) -> list[Any] | None:
    """A list with one number per token; None when absent."""
    values = fields.values.get(key)
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != count or not all(isinstance(v, int | float) for v in values):
        raise fields.error(f"corrupt: {key} is not a list of {count} numbers, one per token")
    return values


def _added(tokens: Sequence[str], types: Sequence[int], wanted: TokenType) -> list[AddedToken]:
    special = wanted is TokenType.CONTROL
    return [
        AddedToken(token, normalized=False, special=special)
        for token, kind in zip(tokens, types, strict=True)
        if kind == wanted and token
    ]


def _token_id(fields: Fields, key: str, count: int) -> int | None:
    """The token id under `key`, None when absent."""
    if fields.values.get(key) is None:
        return None
    value = fields.count(key, at_least=0)
    if value >= count:
        raise fields.error(f"{key} = {value}, but the vocabulary has {count} tokens")
    return value


def _special_ids(fields: Fields, count: int) -> SpecialIds:
    bos, *eos = (_token_id(fields, f"tokenizer.ggml.{name}_token_id", count) for name in ("bos", "eos", "eot", "eom"))
    adds_bos = fields.values["tokenizer.ggml.model"] == "llama" or _pre(fields) in ADDS_BOS_BY_DEFAULT
    adds_bos = fields.flag("tokenizer.ggml.add_bos_token", default=adds_bos)
    adds_eos = fields.flag("tokenizer.ggml.add_eos_token", default=False)
    return SpecialIds(
        bos=bos,
        eos=tuple(token_id for token_id in eos if token_id is not None),
        first=(bos,) if adds_bos and bos is not None else (),
        last=(eos[0],) if adds_eos and eos[0] is not None else (),
    )
