"""What part of their max_tokens answers use."""

from __future__ import annotations

import pytest

from cluster.answer_share import BIN_ANSWERS_MIN, AnswerShare


def test_all_is_used_before_the_first_answer():
    assert AnswerShare().of(100) == 1.0


def test_prompts_of_a_length_speak_for_themselves_once_they_are_many():
    shares = AnswerShare()
    for _ in range(200):
        shares.ended(prompt_tokens=300, max_tokens=1000, answer_tokens=400)
    assert shares.of(2000) == pytest.approx(0.4, rel=0.01), "nothing is known of these"
    for _ in range(BIN_ANSWERS_MIN):
        shares.ended(prompt_tokens=2000, max_tokens=1000, answer_tokens=60)
    assert shares.of(2000) == pytest.approx(0.06, rel=0.01)
    assert shares.of(1500) == shares.of(2000), "alike"
    assert shares.of(300) == pytest.approx(0.4, rel=0.01)
    assert shares.of(10) < 0.4, "of all, for want of better"


def test_answers_of_the_old_kind_that_still_end_say_nothing_of_the_new():
    """The traffic has turned back to long prompts, while hundreds of long answers to short ones come to their end."""
    shares = AnswerShare()
    for _ in range(BIN_ANSWERS_MIN):
        shares.ended(prompt_tokens=2000, max_tokens=1000, answer_tokens=60)
    for _ in range(1000):
        shares.ended(prompt_tokens=300, max_tokens=1000, answer_tokens=400)
    assert shares.of(2000) == pytest.approx(0.06, rel=0.02)


def test_a_change_is_believed_after_some_hundred_answers():
    shares = AnswerShare()
    for _ in range(1000):
        shares.ended(prompt_tokens=300, max_tokens=100, answer_tokens=10)
    for _ in range(250):
        shares.ended(prompt_tokens=300, max_tokens=100, answer_tokens=90)
    assert shares.of(300) > 0.8
