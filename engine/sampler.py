"""Draws tokens from logits. Order, as in vLLM: logit bias, penalties, (min_tokens), structure, temperature, min_p,
top_k, top_p.

A draw is the argmax of filtered logits plus Gumbel noise, which has the distribution of a softmax sample; the noise is
a function of (seed, choice, step, token id) alone (engine/random_draw.py). Greedy is the argmax, lowest id on ties.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from engine.batch import NO_TOKEN, Sampled, SampleSpec
from engine.random_draw import draw_key, gumbel_noise
from engine.structure import Guide

# As in vLLM: below this, dividing by the temperature says no more than taking the maximum.
GREEDY_TEMPERATURE = 1e-5
# Draws whose noise is held at once: bounds memory (8 bytes an entry), and stays in cache.
DRAWS_AT_ONCE = 8
# Sorting a whole vocabulary takes several times longer than picking its best few, which nearly always suffice.
TOP_P_FIRST_TRY = 1024
NEVER = float("-inf")


class Sampler:
    """Holds what does not change between steps: vocabulary size, the model's end tokens, and what holds answers to a
    structure."""

    def __init__(self, vocab_size: int, eos_token_ids: tuple[int, ...], guide: Guide | None = None) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._guide = guide

    @property
    def can_guide(self) -> bool:
        """Whether answers can be held to a structure."""
        return self._guide is not None and self._guide.is_there

    def sample(self, logits: torch.Tensor, specs: Sequence[SampleSpec]) -> tuple[tuple[Sampled, ...], ...]:
        """One entry per choice for each row of logits [len(specs), vocab] float32, which stay unchanged; NO_TOKEN for
        rows that cannot be held to their structure."""
        assert logits.shape == (len(specs), self._vocab_size), f"logits {tuple(logits.shape)} for {len(specs)} rows"
        if not specs:
            return ()
        masks = structure_masks(self._guide, specs)
        edited = self._edit(logits, specs, masks)
        greedy_ids = edited.argmax(-1).tolist()
        drawn = self._draw(edited, specs)
        token_ids = [
            drawn[row] if row in drawn else [greedy_ids[row]] * len(spec.choices) for row, spec in enumerate(specs)
        ]
        logprobs = _logprobs(logits, specs, token_ids)
        drawn_rows = [
            tuple(logprobs.get((row, token_id), Sampled(token_id)) for token_id in ids)
            for row, ids in enumerate(token_ids)
        ]
        return without_lost(drawn_rows, masks)

    def _edit(
        self, logits: torch.Tensor, specs: Sequence[SampleSpec], masks: Mapping[int, torch.Tensor | None]
    ) -> torch.Tensor:
        """Bias, penalties, min_tokens and structure; the logits themselves where no row asks for any."""
        edited = logits
        for row, spec in enumerate(specs):
            banned = self._banned(spec)
            if not (spec.params.logit_bias or spec.params.needs_history or banned):
                continue
            if edited is logits:
                edited = logits.clone()
            _add_bias(edited[row], spec)
            if spec.params.needs_history:
                _penalise(edited[row], spec)
            if banned:
                edited[row, list(banned)] = NEVER
            if (mask := masks.get(row)) is not None:
                edited[row].masked_fill_(mask.to(edited.device), NEVER)
        return edited

    def _banned(self, spec: SampleSpec) -> tuple[int, ...]:
        """Tokens that would end the sequence before its min_tokens."""
        if spec.step >= spec.params.min_tokens:
            return ()
        return spec.params.stop_token_ids + (() if spec.params.ignore_eos else self._eos_token_ids)

    def _draw(self, logits: torch.Tensor, specs: Sequence[SampleSpec]) -> dict[int, list[int]]:
        """Row → token ids, one per choice, for the rows that are not greedy."""
        rows = [row for row, spec in enumerate(specs) if spec.params.temperature >= GREEDY_TEMPERATURE]
        if not rows:
            return {}
        filtered = _filter(logits[rows], [specs[row] for row in rows])
        # One line per draw: (index into `filtered`, row, key).
        draws = [
            (index, row, draw_key(specs[row].seed, choice, specs[row].step))
            for index, row in enumerate(rows)
            for choice in specs[row].choices
        ]
        drawn: dict[int, list[int]] = {row: [] for row in rows}
        for first in range(0, len(draws), DRAWS_AT_ONCE):
            part = draws[first : first + DRAWS_AT_ONCE]
            noise = gumbel_noise([key for _, _, key in part], self._vocab_size, logits.device)
            noise += filtered[[index for index, _, _ in part]]
            for (_, row, _), token_id in zip(part, noise.argmax(-1).tolist(), strict=True):
                drawn[row].append(token_id)
        return drawn


def structure_masks(guide: Guide | None, specs: Sequence[SampleSpec]) -> dict[int, torch.Tensor | None]:
    """Row → [vocab] bool, True for tokens that its structure does not allow; None where the row cannot be held to it.
    Rows without a structure are not in it."""
    masks: dict[int, torch.Tensor | None] = {}
    for row, spec in enumerate(specs):
        if spec.params.structure is not None:
            assert guide is not None, "a structure was taken where nothing can hold answers to it"
            banned = guide.banned(spec.params.structure, spec.output_ids)
            masks[row] = None if banned is None else torch.from_numpy(banned)
    return masks


def without_lost(
    rows: Sequence[tuple[Sampled, ...]], masks: Mapping[int, torch.Tensor | None]
) -> tuple[tuple[Sampled, ...], ...]:
    """What rows drew, with NO_TOKEN for those that cannot be held to their structure."""
    lost = {row for row, mask in masks.items() if mask is None}
    return tuple((Sampled(NO_TOKEN),) * len(drawn) if row in lost else drawn for row, drawn in enumerate(rows))


def _add_bias(logits: torch.Tensor, spec: SampleSpec) -> None:
    if spec.params.logit_bias:
        token_ids, biases = zip(*spec.params.logit_bias, strict=True)
        # Accumulates: the same id may be named twice.
        index = torch.tensor(token_ids, device=logits.device)
        logits.index_add_(0, index, torch.tensor(biases, dtype=logits.dtype, device=logits.device))


def _penalise(logits: torch.Tensor, spec: SampleSpec) -> None:
    """Repetition counts prompt and output (https://arxiv.org/abs/1909.05858), the other two the output alone."""
    params = spec.params
    if params.repetition_penalty != 1.0:
        seen = _index(set(spec.prompt_ids) | set(spec.output_ids), logits)
        scores = logits[seen]
        logits[seen] = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
    if spec.output_ids and (params.presence_penalty or params.frequency_penalty):
        token_ids, counts = torch.unique(_index(spec.output_ids, logits), return_counts=True)
        logits[token_ids] -= params.presence_penalty + params.frequency_penalty * counts


def _index(token_ids: Iterable[int], logits: torch.Tensor) -> torch.Tensor:
    return torch.tensor(list(token_ids), dtype=torch.int64, device=logits.device)


def _filter(logits: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
    """Temperature, then min_p, top_k and top_p, each on what the one before left. Changes `logits` and returns it."""
    temperatures = torch.tensor([[spec.params.temperature] for spec in specs], device=logits.device)
    # The maximum becomes 0 first: dividing by a tiny temperature can then overflow only towards -inf.
    logits.sub_(logits.amax(-1, keepdim=True)).div_(temperatures)
    for row, spec in enumerate(specs):
        params = spec.params
        if params.min_p > 0:
            logits[row].masked_fill_(logits[row] < math.log(params.min_p), NEVER)
        if 0 < params.top_k < logits.shape[-1]:
            least = logits[row].topk(params.top_k).values[-1]
            logits[row].masked_fill_(logits[row] < least, NEVER)
        if params.top_p < 1:
            _keep_top_p(logits[row], params.top_p)
    return logits


def _keep_top_p(logits: torch.Tensor, top_p: float) -> None:
    """Keeps the fewest most likely tokens whose probabilities reach top_p (arXiv:1904.09751), and ties of the last."""
    total = logits.logsumexp(-1)
    for count in (min(TOP_P_FIRST_TRY, len(logits)), len(logits)):
        ordered = logits.topk(count).values
        before = (ordered - total).exp().cumsum(-1).roll(1)
        before[0] = 0
        kept = int((before < top_p).sum())
        if kept < count or count == len(logits):
            logits.masked_fill_(logits < ordered[kept - 1], NEVER)
            return


def _logprobs(
    logits: torch.Tensor, specs: Sequence[SampleSpec], token_ids: Sequence[Sequence[int]]
) -> dict[tuple[int, int], Sampled]:
    """(row, token id) → the token with its logprobs, for the rows that ask for them."""
    found: dict[tuple[int, int], Sampled] = {}
    for row, spec in enumerate(specs):
        if spec.params.logprobs is None:
            continue
        logprobs = logits[row].log_softmax(-1)
        # topk says nothing about the order of equal values; here the lowest id comes first, as greedy takes it.
        values, ids = logprobs.topk(min(spec.params.logprobs, len(logprobs)))
        top = tuple(sorted(zip(ids.tolist(), values.tolist(), strict=True), key=lambda entry: (-entry[1], entry[0])))
        for token_id in token_ids[row]:
            found[row, token_id] = Sampled(token_id, float(logprobs[token_id]), top)
    return found
