"""Answers while they grow: text, stop strings, stop tokens, and what each choice ends with."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.answer import Answer
from cluster.messages import Choice, Chunk
from decode_worker.stream import Delta
from engine.batch import Sampled
from engine.request import FinishReason
from engine.sampling import SamplingParams
from tests.engine.tiny_tokenizers import build, byte_level_metadata

TOKENIZER = build(byte_level_metadata())
FIRST_BYTE_ID = 4
END_ID = 0


def tokens(text: str) -> tuple[Sampled, ...]:
    """One token per byte."""
    return tuple(Sampled(FIRST_BYTE_ID + byte) for byte in text.encode())


def delta(text: str, choice: int = 0, finish: FinishReason | None = None, stop_token: int | None = None) -> Delta:
    drawn = tokens(text) + ((Sampled(stop_token),) if stop_token is not None else ())
    return Delta("r", choice, drawn, finish, stop_token)


def only_choice(answer: Answer) -> Choice:
    [choice] = answer.choices()
    return choice


def shown(chunk: Chunk | None) -> tuple[str, int]:
    """(text, number of tokens)"""
    assert chunk is not None
    return chunk.text, len(chunk.tokens)


def test_text_comes_as_soon_as_its_characters_are_whole() -> None:
    answer = Answer(SamplingParams(), TOKENIZER)
    euro = tokens("€")
    assert shown(answer.add(Delta("r", 0, euro[:2]), 1.0)) == ("", 2)
    assert shown(answer.add(Delta("r", 0, euro[2:]), 2.0)) == ("€", 1)
    assert not answer.has_ended
    assert shown(answer.add(delta("ab", finish=FinishReason.LENGTH), 3.0)) == ("ab", 2)
    assert only_choice(answer) == Choice(0, "€ab", tokens("€ab"), FinishReason.LENGTH)
    assert answer.has_ended


def test_a_stop_token_is_a_token_of_the_answer_but_has_no_text() -> None:
    answer = Answer(SamplingParams(skip_special_tokens=False), TOKENIZER)
    answer.add(delta("hi"), 1.0)
    assert shown(answer.add(delta("", finish=FinishReason.STOP, stop_token=END_ID), 2.0)) == ("", 1)
    expected = Choice(0, "hi", (*tokens("hi"), Sampled(END_ID)), FinishReason.STOP, matched_token_id=END_ID)
    assert only_choice(answer) == expected


@pytest.mark.parametrize(("include", "text"), [(False, "one "), (True, "one two")])
def test_a_stop_string_ends_the_answer_with_the_token_that_completes_it(include: bool, text: str) -> None:
    answer = Answer(SamplingParams(stop=("zwei", "two"), include_stop_str_in_output=include), TOKENIZER)
    assert shown(answer.add(delta("one t"), 1.0)) == ("one ", 5)
    assert not answer.has_ended
    assert shown(answer.add(delta("wo three", finish=None), 2.0)) == (text[4:], 2)
    assert answer.has_ended
    assert answer.add(delta("more"), 3.0) is None
    assert only_choice(answer) == Choice(0, text, tokens("one two"), FinishReason.STOP, matched_stop_str="two")


def test_a_stop_string_in_the_last_token() -> None:
    answer = Answer(SamplingParams(stop=("two",)), TOKENIZER)
    answer.add(delta("two", finish=FinishReason.LENGTH), 1.0)
    assert only_choice(answer).finish_reason is FinishReason.STOP


def test_text_held_for_a_stop_string_that_did_not_come_is_shown_at_the_end() -> None:
    answer = Answer(SamplingParams(stop=("stop!",)), TOKENIZER)
    assert shown(answer.add(delta("now stop"), 1.0)) == ("now ", 8)
    assert shown(answer.add(delta("", finish=FinishReason.STOP, stop_token=END_ID), 2.0)) == ("stop", 1)


def test_bytes_that_stay_unfinished_may_still_stop_the_answer() -> None:
    answer = Answer(SamplingParams(stop=("\N{REPLACEMENT CHARACTER}",)), TOKENIZER)
    euro = tokens("€")
    assert shown(answer.add(Delta("r", 0, euro[:2], FinishReason.LENGTH), 1.0)) == ("", 2)
    assert only_choice(answer).matched_stop_str == "\N{REPLACEMENT CHARACTER}"


def test_the_first_min_tokens_cannot_stop_it() -> None:
    answer = Answer(SamplingParams(stop=("a",), min_tokens=3), TOKENIZER)
    answer.add(delta("aaaa"), 1.0)
    assert only_choice(answer) == Choice(0, "aaa", tokens("aaaa"), FinishReason.STOP, matched_stop_str="a")


def test_choices_end_each_on_its_own() -> None:
    answer = Answer(SamplingParams(n=3, stop=(".",)), TOKENIZER)
    answer.add(delta("a.", choice=0), 1.0)
    answer.add(delta("b", choice=1, finish=FinishReason.LENGTH), 1.0)
    assert not answer.has_ended
    answer.add(delta("c", choice=2), 2.0)
    assert [choice.finish_reason for choice in answer.choices()] == ["stop", "length", "abort"]
    answer.add(delta(".", choice=2), 3.0)
    assert answer.has_ended
    answer.add(delta("x", choice=0, finish=FinishReason.LENGTH), 3.0)
    answer.add(delta("x", choice=2, finish=FinishReason.LENGTH), 3.0)
    assert [choice.text for choice in answer.choices()] == ["a", "b", "c"]
    assert answer.token_count == 5


def test_time_per_token_is_over_the_longest_choice() -> None:
    answer = Answer(SamplingParams(n=2), TOKENIZER)
    assert (answer.first_s, answer.tpot_s) == (None, 0.0)
    answer.add(delta("a", choice=0), 10.0)
    assert answer.tpot_s == 0.0
    answer.add(delta("a", choice=1), 10.0)
    answer.add(delta("b", choice=1), 11.0)
    answer.add(delta("c", choice=1), 14.0)
    assert (answer.first_s, answer.last_s, answer.tpot_s) == (10.0, 14.0, 2.0)


def test_without_a_tokenizer_there_are_tokens_and_no_text() -> None:
    answer = Answer(SamplingParams(), None)
    assert shown(answer.add(delta("ab", finish=FinishReason.LENGTH), 1.0)) == ("", 2)
    assert only_choice(answer).tokens == tokens("ab")


@given(st.text("abc€", max_size=12), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3), st.data())
def test_however_the_tokens_are_cut_the_answer_is_the_same(text: str, stops: list[str], data: st.DataObject) -> None:
    drawn = tokens(text)
    params = SamplingParams(stop=tuple(stops))
    whole = Answer(params, TOKENIZER)
    whole.add(Delta("r", 0, drawn, FinishReason.LENGTH), 1.0)
    cut = data.draw(st.integers(0, len(drawn)))
    parts = Answer(params, TOKENIZER)
    chunks = [
        parts.add(Delta("r", 0, drawn[:cut]), 1.0),
        parts.add(Delta("r", 0, drawn[cut:], FinishReason.LENGTH), 1.0),
    ]
    assert parts.choices() == whole.choices()
    assert "".join(chunk.text for chunk in chunks if chunk) == only_choice(whole).text
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if ends:
        assert only_choice(whole).matched_stop_str is not None
        assert only_choice(whole).tokens == tokens(text[: min(ends)])
    else:
        assert only_choice(whole).text == text
