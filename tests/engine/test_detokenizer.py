"""Streaming detokenization: whatever the split, the pieces joined are what decoding at once gives."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.detokenizer import Detokenizer
from engine.tokenizer import Tokenizer
from tests.engine.tiny_tokenizers import build, byte_level_metadata, sentencepiece_metadata

TOKENIZERS = {
    "byte_level": build(byte_level_metadata()),
    "sentencepiece": build(sentencepiece_metadata()),
    "no_space_prefix": build({**sentencepiece_metadata(), "tokenizer.ggml.add_space_prefix": False}),
}
kinds = st.sampled_from(sorted(TOKENIZERS))
# Ids of any token and, more often, of bytes of characters that take several: so both valid and broken UTF-8 come up.
texts = st.text(st.sampled_from("the lo é你😀👩‍🚀\x00"), max_size=8)
splits = st.lists(st.integers(0, 5), max_size=60)


@st.composite
def token_lists(draw: st.DrawFn, tokenizer: Tokenizer) -> list[int]:
    token_ids: list[int] = []
    for _ in range(draw(st.integers(0, 6))):
        if draw(st.booleans()):
            token_ids += tokenizer.encode(draw(texts), add_special_tokens=draw(st.booleans()))
        else:
            token_ids += draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=5))
        del token_ids[len(token_ids) - draw(st.integers(0, 2)) :]
    return token_ids


def stream(tokenizer: Tokenizer, token_ids: list[int], sizes: list[int], skip: bool) -> list[str]:
    """Pushes runs of the given sizes, the rest token by token; returns each push's text, and flush's at the end."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    pieces, start = [], 0
    for size in [*sizes, *[1] * len(token_ids)]:
        pieces.append(detokenizer.push(token_ids[start : start + size]))
        start += size
    return [*pieces, detokenizer.flush()]


@given(st.data(), kinds, splits, st.booleans())
def test_pieces_joined_are_the_decoded_whole(data: st.DataObject, kind: str, sizes: list[int], skip: bool) -> None:
    tokenizer = TOKENIZERS[kind]
    token_ids = data.draw(token_lists(tokenizer))
    assert "".join(stream(tokenizer, token_ids, sizes, skip)) == tokenizer.decode(token_ids, skip)


@given(st.data(), kinds, st.booleans())
def test_what_was_given_out_stays_true_whatever_follows(data: st.DataObject, kind: str, skip: bool) -> None:
    tokenizer = TOKENIZERS[kind]
    token_ids = data.draw(token_lists(tokenizer))
    given_out = Detokenizer(tokenizer, skip).push(token_ids)
    more = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=4))
    assert tokenizer.decode(token_ids + more, skip).startswith(given_out)


def test_a_character_appears_with_its_last_byte() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    token_ids = tokenizer.encode("a😀b")
    assert len(token_ids) == 5, "a, ðŁ merged, two bytes, b"
    assert stream(tokenizer, token_ids, [1] * 5, skip=True)[:5] == ["a", "", "", "😀", "b"]


def test_a_run_of_byte_tokens_is_held_until_it_ends() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    token_ids = tokenizer.encode("é😀 t", add_special_tokens=False)
    pieces = [piece for piece in stream(tokenizer, token_ids, [], skip=True) if piece]
    assert pieces == ["é", "😀 t"]


def test_unfinished_bytes_come_out_as_replacement_on_flush() -> None:
    for kind in ("byte_level", "sentencepiece"):
        tokenizer = TOKENIZERS[kind]
        token_ids = tokenizer.encode("t😀", add_special_tokens=False)[:-1]
        pieces = stream(tokenizer, token_ids, [], skip=True)
        assert pieces[-1] == tokenizer.decode(token_ids)[1:]
        assert "\ufffd" in pieces[-1]


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_are_shown_only_when_asked_for(skip: bool) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    token_ids = [1, *tokenizer.encode("hel"), 2, 3, 0]
    whole = "hel<think>" if skip else "<|start|>hel<｜odd spelling｜><think><|end|>"
    assert "".join(stream(tokenizer, token_ids, [], skip)) == whole


def test_the_cost_of_a_token_does_not_grow_with_the_text() -> None:
    for kind in sorted(TOKENIZERS):
        tokenizer = TOKENIZERS[kind]
        for token_ids in (tokenizer.encode("the lo" * 10), tokenizer.encode("😀", add_special_tokens=False)):
            started = time.perf_counter()
            stream(tokenizer, token_ids * (20_000 // len(token_ids)), [], skip=True)
            # Decoding all again for each token would take minutes.
            assert time.perf_counter() - started < 5.0


def test_tokens_after_flush_are_a_bug() -> None:
    detokenizer = Detokenizer(TOKENIZERS["byte_level"])
    detokenizer.flush()
    with pytest.raises(AssertionError, match="after flush"):
        detokenizer.push([5])
    with pytest.raises(AssertionError, match="flushed twice"):
        detokenizer.flush()
