"""Which choices can go on after a step that is still under way: their next token is computed before it is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import attrgetter

from decode_worker.flight import Reached
from decode_worker.sequence import Choice

AGE = attrgetter("age")


def going_on(
    running: Iterable[Choice], computing: Iterable[Choice], reached: Mapping[Choice, Reached]
) -> list[Choice] | None:
    """Choices with a token to compute after the step under way, the oldest first. Some may turn out to have ended.

    None when that step must be completed first, since a choice's next row depends on more than the token that it draws:
    a prompt with n > 1 is forked at its end, and penalties count the tokens drawn before. Leaving out such a choice
    instead would give it a token in every second step only.
    """
    ending_prompts = [choice for choice in computing if choice in reached and reached[choice].draws]
    found: list[Choice] = []
    for choice in sorted((*running, *ending_prompts), key=AGE):
        after = reached.get(choice)
        if after is not None:
            if choice.ends_by_length(1):
                continue
            if len(after.draws) > 1 or choice.request.submit.params.needs_history:
                return None
        found.append(choice)
    return found


def most_blocks(choices: Iterable[Choice], reached: Mapping[Choice, Reached], block_size: int) -> int:
    """Blocks that one token more of each choice can take at most."""
    return sum(_may_take_block(choice, reached.get(choice), block_size) for choice in choices)


def _may_take_block(choice: Choice, after: Reached | None, block_size: int) -> bool:
    start = len(choice.token_ids) - 1 if after is None else after.end
    # A tail that was just forked is copied by all but one of its readers.
    is_fork = choice.request.submit.params.n > 1 and start == choice.prompt_tokens
    return is_fork or start % block_size == 0
