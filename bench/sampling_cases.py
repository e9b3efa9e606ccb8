"""Drawing a token for every row of a batch's logits, beside torch's ways to do so."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from bench.kernel_case import Case, Sizes, Work
from engine.batch import SampleSpec
from engine.device_sampler import DeviceSampler
from engine.sampler import Sampler
from engine.sampling import SamplingParams

WAYS = {
    "greedy": SamplingParams(temperature=0.0),
    "top-k 50 and top-p 0.9": SamplingParams(temperature=0.8, top_k=50, top_p=0.9),
}


def sampling_cases(sizes: Sizes, batch: int) -> Iterator[Case]:
    """Ours are the launches that a step makes; what the rows ask for is on the device already. Nothing waits, but for
    engine/sampler.py, which must read what it drew."""
    logits = torch.randn(batch, sizes.vocab, device=sizes.device) * 3
    ours, plain = DeviceSampler(sizes.vocab, (), sizes.device), Sampler(sizes.vocab, ())
    for name, params in WAYS.items():
        specs = [SampleSpec(params, seed=row, step=0) for row in range(batch)]
        prepared = ours.prepare(specs)
        peers: dict[str, Work] = {"engine/sampler.py": partial(plain.sample, logits, specs)}
        peers["torch"] = partial(draw_by_topk, logits, params)
        if not params.is_greedy:
            peers["torch, sorted"] = partial(draw_by_sort, logits, params)
        yield Case(
            f"sampling, batch {batch}, vocabulary {sizes.vocab}, {name}",
            partial(ours.draw, logits, prepared),
            moved=logits.nbytes,
            peers=peers,
        )


def draw_by_topk(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Token ids [rows], where all rows have the same top_k."""
    if params.is_greedy:
        return logits.argmax(-1)
    values, ids = (logits / params.temperature).topk(params.top_k)
    return ids.gather(-1, _draw(values, params.top_p)).squeeze(-1)


def draw_by_sort(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The same by sorting the whole vocabulary, as one must where each row has its own top_k."""
    values, ids = (logits / params.temperature).sort(-1, descending=True)
    ranks = torch.arange(values.shape[-1], device=logits.device)
    kept = values.masked_fill(ranks >= params.top_k, float("-inf"))
    return ids.gather(-1, _draw(kept, params.top_p)).squeeze(-1)


def _draw(ordered: torch.Tensor, top_p: float) -> torch.Tensor:
    """A place in each row of falling logits [rows, 1]: the argmax of probability over exponential noise."""
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.masked_fill(before >= top_p, 0.0)
    return (kept / torch.empty_like(kept).exponential_()).argmax(-1, keepdim=True)
