"""The rows of a decode worker's batches: one token of a running choice, or a chunk of a prompt computed here."""

from __future__ import annotations

from collections.abc import Sequence

from decode_worker.flight import Reached
from decode_worker.sequence import Choice, RequestState
from engine.batch import PENDING_TOKEN, Row, SampleSpec


def decode_row(choice: Choice, reached: Reached | None) -> Row:
    """Computes a choice's last token and draws the next. With `reached`, the last token is the one that the step under
    way draws."""
    token_ids = choice.token_ids
    if reached is None:
        start = len(token_ids) - 1
        return Row(choice.owner, (token_ids[start],), start, choice.block_ids, _sample(choice, 0, choice.draws))
    assert reached.end == len(token_ids), f"{choice.owner} cannot follow a step that ends at {reached.end}"
    (follows,) = reached.draws
    return Row(choice.owner, (PENDING_TOKEN,), reached.end, choice.block_ids, _sample(choice, 1, choice.draws), follows)


def chunk_row(choice: Choice, block_ids: Sequence[int], start: int, count: int) -> Row:
    """Computes tokens [start, start + count) of a choice, and draws what follows when these are the last."""
    sample = None
    if start + count == len(choice.token_ids):
        is_prompt = choice.request.state is RequestState.LOCAL
        sample = _sample(choice, 0, tuple(range(choice.request.submit.params.n)) if is_prompt else (choice.index,))
    return Row(choice.owner, tuple(choice.token_ids[start : start + count]), start, block_ids, sample)


def _sample(choice: Choice, ahead: int, choices: tuple[int, ...]) -> SampleSpec:
    """The draw after the tokens known so far, and `ahead` more."""
    submit = choice.request.submit
    step = len(choice.token_ids) - choice.prompt_tokens + ahead
    if not submit.params.needs_history:
        return SampleSpec(submit.params, submit.seed, step, choices)
    prompt_ids, output_ids = choice.token_ids[: choice.prompt_tokens], choice.token_ids[choice.prompt_tokens :]
    return SampleSpec(submit.params, submit.seed, step, choices, prompt_ids, output_ids)
