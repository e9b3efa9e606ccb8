"""Which running choices are in the next step, and how long it may take. Pure.

A choice that is to have a token every `tpot_s` on average has a time at which each one is due:

    first token ── tpot ──▶ due ── tpot ──▶ due ── …        its own tokens may be ahead of that, or behind

What it is ahead is slack: a step may take as long as the least slack of those in it, and longer than one `tpot_s`.
With a prompt's chunk in it, it may take as long as they can make up for with their next few tokens.
While all running choices together meet that, they all run. When they do not, leaving out some makes the step shorter
for the others. Leaving out those in turn would slow down everybody, since a step's fixed cost is paid more often per
token. So whoever is in time stays so, and the others get what is left:

    1. has waited longest, and too long: one a step, so nobody starves
    2. in time, and due soon      would be late after another step without a token
    3. late                       may catch up, the least late first
    4. well ahead                 can wait, so that its slack is used
    5. beyond hope, or without an objective

Choices are taken in this order as long as the step that they make together is short enough for each of them.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from operator import attrgetter

from decode_worker.sequence import Choice
from engine.step_cost import StepCost, StepWork

# A step is planned to end this share of the time before the first due time: predictions are off by some percent.
MARGIN = 0.95
# Who has been without a token for longer than this, and longest of all, goes first.
MAX_PAUSE_S = 1.0

# A prompt's chunk may hold up rows that will be in time again after so many tokens. An answer that ends before that
# has missed, so it is a small part of a usual one.
REPAY_TOKENS = 16

AGE = attrgetter("age")
LAST_TOKEN_S = attrgetter("last_token_s")


@dataclass(frozen=True, slots=True)
class Selection:
    """`choices` in order of age, and `work`, their step. `limit_s`: how long it may take with prompts beside it, inf
    where that is no matter. As long as a step takes at most `steady_s`, the next one is made up alike."""

    choices: Sequence[Choice]
    work: StepWork
    limit_s: float = math.inf
    steady_s: float = math.inf


def select(
    choices: Sequence[Choice], cost: StepCost | None, max_rows: int, now: float, drawing: Container[Choice] = ()
) -> Selection:
    """At most `max_rows` of `choices`, which come in order of age. A step under way draws a token of each of
    `drawing`."""
    if cost is None or not any(choice.tpot_s for choice in choices):
        chosen = list(choices[:max_rows])
        return Selection(chosen, _work(chosen))
    work = _work(choices)
    whole_s, alone_s = cost.step_s(work), cost.step_s(StepWork((), 1, 1))
    limit_s, tightest_s = _limits(choices, alone_s, now, drawing)
    if whole_s <= limit_s and len(choices) <= max_rows:
        limit_s = max(limit_s, _debt_s(choices, whole_s, alone_s, now, drawing))
        return Selection(list(choices), work, limit_s, tightest_s)
    order = sorted(choices, key=lambda choice: (_tier(choice, whole_s, alone_s, now, drawing), choice.age))
    # Whose first token is still on the way has not waited for another yet.
    begun = [choice for choice in order if choice.request.times.first_token_s is not None]
    paused = min(begun, key=LAST_TOKEN_S, default=None)
    if paused is not None and now - paused.last_token_s > MAX_PAUSE_S:
        order.remove(paused)
        order.insert(0, paused)
    count = _most_rows(order[:max_rows], cost, alone_s, now, drawing)
    chosen = sorted(order[:count], key=AGE)
    limit_s, _ = _limits(chosen, alone_s, now, drawing)
    return Selection(chosen, _work(chosen), limit_s, 0.0)


def _debt_s(choices: Sequence[Choice], step_s: float, alone_s: float, now: float, drawing: Container[Choice]) -> float:
    """How long a step may take if each is to be in time again after its next few tokens, in steps of `step_s`. Who is
    lost asks for nothing."""
    least_s = math.inf
    for choice in choices:
        due = due_s(choice, int(choice in drawing))
        if choice.tpot_s is None or (due < now and _is_lost(choice, due, alone_s, now)):
            continue
        tokens = min(REPAY_TOKENS, choice.max_length - len(choice.token_ids) - (choice in drawing))
        least_s = min(least_s, due - now + (tokens - 1) * (choice.tpot_s - step_s))
    return MARGIN * least_s


def due_s(choice: Choice, ahead: int = 0) -> float:
    """When its next token should be there, or the one after `ahead` drawn already; inf without an objective."""
    first_s = choice.request.times.first_token_s
    if choice.tpot_s is None or first_s is None:
        return math.inf
    return first_s + (len(choice.token_ids) - choice.given_tokens + ahead) * choice.tpot_s


def _is_lost(choice: Choice, due: float, alone_s: float, now: float) -> bool:
    """Whether a late choice cannot catch up by its last token, even if it were alone from now on."""
    assert choice.tpot_s is not None, "without an objective nothing is lost"
    gain_s = (choice.max_length - len(choice.token_ids)) * (choice.tpot_s - alone_s)
    return now - due > max(0.0, gain_s)


def _limits(choices: Sequence[Choice], alone_s: float, now: float, drawing: Container[Choice]) -> tuple[float, float]:
    """How long a step with all of them may take for each to have its token in time, and for each to keep its pace.

    Nobody asks for a step that is shorter than its pace: a token that is late for once costs little, and the margin
    makes up for it. Who is lost asks for nothing."""
    limit_s = tightest_s = math.inf
    for choice in choices:
        if choice.tpot_s is None:
            continue
        due = due_s(choice, int(choice in drawing))
        if due < now and _is_lost(choice, due, alone_s, now):
            continue
        limit_s = min(limit_s, max(due - now, choice.tpot_s))
        tightest_s = min(tightest_s, choice.tpot_s)
    return MARGIN * limit_s, MARGIN * tightest_s


def _tier(choice: Choice, whole_s: float, alone_s: float, now: float, drawing: Container[Choice]) -> tuple[int, float]:
    """Of the list above, and what orders it within."""
    if choice.tpot_s is None:
        return 5, choice.last_token_s
    due = due_s(choice, int(choice in drawing))
    slack_s = due - now - alone_s
    if slack_s < 0:
        return (5, choice.last_token_s) if _is_lost(choice, due, alone_s, now) else (3, -due)
    # Another step of the others, and then one with this choice.
    return (2 if slack_s < 2 * whole_s else 4), due


def _most_rows(order: Sequence[Choice], cost: StepCost, alone_s: float, now: float, drawing: Container[Choice]) -> int:
    """How many of `order` make a step that is short enough for each of them; at least 1. The more, the longer the step
    and the shorter the least slack, so a binary search finds it."""

    def is_short_enough(count: int) -> bool:
        limit_s, _ = _limits(order[:count], alone_s, now, drawing)
        return cost.step_s(_work(order[:count])) <= limit_s

    good, bad = 1, len(order) + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        if is_short_enough(middle):
            good = middle
        else:
            bad = middle
    return good


def _work(choices: Sequence[Choice]) -> StepWork:
    return StepWork((), len(choices), sum([len(choice.token_ids) for choice in choices]))
