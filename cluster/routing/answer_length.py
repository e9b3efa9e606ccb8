"""How long answers are, told before the long ones have ended.

The first answers to end after a change are the short ones: a mean over those that have ended believes for as long as a
long answer takes that all are short, and then, when the long ones end together, that all are long. So tokens count when
they are drawn, and not when their answer ends:

    mean  =  tokens drawn lately, of ended and of running answers  /  answers that ended lately

which is the maximum likelihood estimate of a mean lifetime while some still live (Epstein and Sobel, Life testing,
JASA 1953), exactly so for answers that may end at any token with the same chance.
"""

from __future__ import annotations

# Answers that it looks back on, and how many of them the guess at the start is worth.
ANSWERS = 256
GUESS_WORTH = 8


class AnswerLength:
    """Mean tokens of an answer; `guess` until answers have been seen."""

    def __init__(self, guess: float) -> None:
        self._tokens = GUESS_WORTH * guess
        self._ended = float(GUESS_WORTH)

    @property
    def mean(self) -> float:
        return self._tokens / self._ended

    def drew(self, tokens: int) -> None:
        """So many tokens of some answer have come."""
        self._tokens += tokens

    def ended(self, answers: int) -> None:
        """So many answers are complete. Those that were broken off are not: how long they would have become is unknown,
        and what was drawn of them counts."""
        keep = (1.0 - 1.0 / ANSWERS) ** answers
        self._tokens *= keep
        self._ended = keep * self._ended + answers
