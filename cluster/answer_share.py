"""Which part of their `max_tokens` answers use, by the length of their prompts.

Kinds of traffic differ in both: long documents get short answers, short questions long ones. When the traffic turns
from one to the other, answers of the old kind go on ending for as long as a long answer takes, and one mean over all
would take the new kind to be like them. Apart by powers of two of the prompt's length, a kind that was seen before is
known at once. For the controller, which asks about arrivals; how long running answers will be is the router's question
(routing/answer_length.py).
"""

from __future__ import annotations

from dataclasses import dataclass

# A new kind of traffic is believed after some hundred answers.
KEEP = 0.99
# Answers from which on prompts of a length speak for themselves.
BIN_ANSWERS_MIN = 20


@dataclass(slots=True)
class _Sums:
    """Of the last hundred answers or so."""

    count: int = 0
    asked: float = 1.0
    answered: float = 1.0

    def add(self, max_tokens: int, answer_tokens: int) -> None:
        self.count += 1
        self.asked = KEEP * self.asked + max_tokens
        self.answered = KEEP * self.answered + answer_tokens


class AnswerShare:
    """Of one model's traffic. 1.0 before the first answer."""

    def __init__(self) -> None:
        self._all = _Sums()
        # By the bit length of the prompt's length: some twenty at most.
        self._bins: dict[int, _Sums] = {}

    @property
    def answers(self) -> int:
        """How many have ended."""
        return self._all.count

    def ended(self, prompt_tokens: int, max_tokens: int, answer_tokens: int) -> None:
        """A request was answered in full."""
        self._all.add(max_tokens, answer_tokens)
        self._bins.setdefault(prompt_tokens.bit_length(), _Sums()).add(max_tokens, answer_tokens)

    def of(self, prompt_tokens: int) -> float:
        """What part of its `max_tokens` the answer to such a prompt will use."""
        alike = self._bins.get(prompt_tokens.bit_length())
        sums = self._all if alike is None or alike.count < BIN_ANSWERS_MIN else alike
        return sums.answered / sums.asked
