"""The Sampler whose draws stay on the device: the host waits once, when it wants to know what was drawn.

    prepare    host: lays out what the rows ask for in one packed tensor, and starts its copy to the device
    launch     queues the kernels, and the copy of what they draw to the host; waits for nothing
    finish     waits for that copy, not for work queued since

Semantics are those of engine/sampler.py. Greedy tokens, edits, and what min_p and top_k keep are equal to the bit on
the same logits. Two roundings differ: the noise, by a unit in the last place or two, and the weights that top_p
compares, by some 5e-7 of themselves, since Sampler rounds the logarithm of their sum to float32. So tokens are equal
but for draws in which two tokens come that close: about one in a million. Of tokens with equal log-probabilities, the
two may also choose different ones as the last of the top few.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from engine.batch import Sampled, SampleSpec
from engine.random_draw import draw_key
from engine.sampler import GREEDY_TEMPERATURE, NEVER, structure_masks, without_lost
from engine.sampling import SamplingParams
from engine.structure import Guide
from kernels.gpu.sample import sample
from kernels.gpu.sample_cuts import INFINITY_DEPTH
from kernels.gpu.sample_inputs import SampleInputs, SampleShape, empty_inputs

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """What a batch asks for. `inputs` are on the device. Two batches whose `inputs.shape` are equal lead to the same
    launches."""

    inputs: SampleInputs
    specs: tuple[SampleSpec, ...]
    # What structures do not allow, [rows, vocab] bool on the device; None where no row has one.
    banned: torch.Tensor | None = None
    # The same by row, on the host: see structure_masks.
    masks: Mapping[int, torch.Tensor | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """Results on the device. Log-probabilities are None where no row asks, else cover the rows that do."""

    prepared: Prepared
    token_ids: torch.Tensor  # [draws] int64
    logprobs: torch.Tensor | None = None  # [logprob draws] float32
    top_ids: torch.Tensor | None = None  # [logprob rows, top] int64
    top_logprobs: torch.Tensor | None = None  # [logprob rows, top] float32
    # The same in host memory once `arrived` has happened; on a CPU it has.
    on_host: Drawn | None = None
    arrived: torch.cuda.Event | None = None


class DeviceSampler:
    """Holds what does not change between steps. Not for several threads.

    On a CPU device it needs Triton's interpreter, and is slow: it is there for tests.
    """

    def __init__(
        self,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        device: torch.device = CPU,
        guide: Guide | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        # A token beyond the vocabulary cannot be drawn, so it need not be banned.
        self._eos_token_ids = tuple(token_id for token_id in eos_token_ids if token_id < vocab_size)
        self._device = device
        self._guide = guide

    @property
    def can_guide(self) -> bool:
        """Whether answers can be held to a structure."""
        return self._guide is not None and self._guide.is_there

    def sample(self, logits: torch.Tensor, specs: Sequence[SampleSpec]) -> tuple[tuple[Sampled, ...], ...]:
        """All in one, as Sampler.sample."""
        return self.finish(self.launch(logits, self.prepare(specs)))

    def prepare(self, specs: Sequence[SampleSpec]) -> Prepared:
        """Depends on no logits, so it may come long before them."""
        edits = [_biases(spec, self._banned(spec)) for spec in specs]
        histories = [_history(spec, self.vocab_size) for spec in specs]
        shape = self._shape(specs, edits, histories)
        inputs = empty_inputs(shape, pinned=self._device.type == "cuda")
        _pack_draws(specs, inputs)
        _pack_filters(specs, self.vocab_size, inputs)
        _pack_biases(edits, inputs)
        _pack_histories(specs, histories, inputs)
        masks = structure_masks(self._guide, specs)
        return Prepared(inputs.on(self._device), tuple(specs), self._banned_by(masks, len(specs)), masks)

    def launch(self, logits: torch.Tensor, prepared: Prepared) -> Drawn:
        """Draws from logits [rows, vocab] float32 on the device, which stay unchanged."""
        return self._fetch(self.draw(logits, prepared))

    def draw(self, logits: torch.Tensor, prepared: Prepared) -> Drawn:
        """The part of `launch` that stays on the device, and may be recorded in a CUDA graph."""
        shape = prepared.inputs.shape
        assert logits.shape == (shape.rows, self.vocab_size), f"logits {tuple(logits.shape)} for {shape.rows} rows"
        if shape.draws == 0:
            return Drawn(prepared, torch.empty(0, dtype=torch.int64, device=self._device))
        # Log-probabilities below are of the logits as they came.
        allowed = logits if prepared.banned is None else logits.masked_fill(prepared.banned, NEVER)
        token_ids = sample(allowed.contiguous(), prepared.inputs)
        if shape.logprob_draws == 0:
            return Drawn(prepared, token_ids)
        inputs = prepared.inputs
        logprobs = logits.index_select(0, inputs.logprob_rows).log_softmax(-1)
        drawn = logprobs[inputs.logprob_lines, token_ids.index_select(0, inputs.logprob_draws)]
        top = logprobs.topk(shape.top)
        return Drawn(prepared, token_ids, drawn, top.indices, top.values)

    def finish(self, drawn: Drawn) -> tuple[tuple[Sampled, ...], ...]:
        """One entry per choice for each row. Waits until the device has drawn."""
        if drawn.on_host is None:
            drawn = self._fetch(drawn)
        if drawn.arrived is not None:
            drawn.arrived.synchronize()
        assert drawn.on_host is not None, "it is fetched by now"
        return without_lost(list(_rows(drawn.on_host)), drawn.prepared.masks)

    def _fetch(self, drawn: Drawn) -> Drawn:
        """Starts the copy to the host."""
        if self._device.type != "cuda":
            return replace(drawn, on_host=drawn)
        tensors = (drawn.token_ids, drawn.logprobs, drawn.top_ids, drawn.top_logprobs)
        on_host = Drawn(drawn.prepared, *map(_to_pinned, tensors))  # type: ignore[arg-type]
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        return replace(drawn, on_host=on_host, arrived=arrived)

    def _banned_by(self, masks: Mapping[int, torch.Tensor | None], rows: int) -> torch.Tensor | None:
        if not masks:
            return None
        banned = torch.zeros(rows, self.vocab_size, dtype=torch.bool)
        for row, mask in masks.items():
            if mask is not None:
                banned[row] = mask
        return banned.to(self._device)

    def _banned(self, spec: SampleSpec) -> tuple[int, ...]:
        """Tokens that would end the sequence before its min_tokens."""
        if spec.step >= spec.params.min_tokens:
            return ()
        return spec.params.stop_token_ids + (() if spec.params.ignore_eos else self._eos_token_ids)

    def _shape(
        self, specs: Sequence[SampleSpec], edits: Sequence[dict[int, list[float]]], histories: Sequence[_History | None]
    ) -> SampleShape:
        """Sizes that differ from step to step are rounded up, so that shapes come again."""
        lengths = [len(history.token_ids) for history in histories if history is not None]
        drawing = [spec.params for spec in specs if not _is_greedy(spec)]
        asking = [spec for spec in specs if spec.params.logprobs is not None]
        return SampleShape(
            rows=len(specs),
            draws=sum(len(spec.choices) for spec in specs),
            biased=_round_up(sum(map(len, edits))),
            biases=_round_up(sum(len(values) for row in edits for values in row.values())),
            biases_each=max((len(values) for row in edits for values in row.values()), default=0),
            histories=len(lengths),
            history_ids=_round_up(sum(lengths)),
            history_each=_round_up(max(lengths, default=0)),
            logprob_rows=len(asking),
            logprob_draws=sum(len(spec.choices) for spec in asking),
            top=min(self.vocab_size, max((spec.params.logprobs or 0 for spec in asking), default=0)),
            any_noise=bool(drawing),
            any_top_k=any(_top_k(params, self.vocab_size) for params in drawing),
            any_top_p=any(np.float32(params.top_p) < 1 for params in drawing),
        )


@dataclass(frozen=True, slots=True)
class _History:
    """The tokens that a row's penalties count, the prompt's before the output's."""

    token_ids: np.ndarray[tuple[int], np.dtype[np.int32]]
    prompt_count: int


def _is_greedy(spec: SampleSpec) -> bool:
    return spec.params.temperature < GREEDY_TEMPERATURE


def _top_k(params: SamplingParams, vocab_size: int) -> int:
    """0 where it limits nothing."""
    return params.top_k if 0 < params.top_k < vocab_size else 0


def _biases(spec: SampleSpec, banned: tuple[int, ...]) -> dict[int, list[float]]:
    """Token id → what is added to its logit, one after the other."""
    biases: dict[int, list[float]] = {}
    for token_id, bias in (*spec.params.logit_bias, *((token_id, NEVER) for token_id in banned)):
        biases.setdefault(token_id, []).append(bias)
    return biases


def _history(spec: SampleSpec, vocab_size: int) -> _History | None:
    if not spec.params.needs_history:
        return None
    # Only repetition looks at the prompt.
    prompt = spec.prompt_ids if spec.params.repetition_penalty != 1.0 else ()
    token_ids = np.empty(len(prompt) + len(spec.output_ids), dtype=np.int32)
    token_ids[: len(prompt)] = prompt
    token_ids[len(prompt) :] = spec.output_ids
    # Kernels write where these say.
    assert not len(token_ids) or (token_ids.min() >= 0 and token_ids.max() < vocab_size), "a token is no token"
    return _History(token_ids, len(prompt))


def _pack_draws(specs: Sequence[SampleSpec], inputs: SampleInputs) -> None:
    keys = [draw_key(spec.seed, choice, spec.step) for spec in specs for choice in spec.choices]
    inputs.keys.numpy()[:] = np.array(keys, dtype=np.uint64).view(np.int64)
    rows = [row for row, spec in enumerate(specs) for _ in spec.choices]
    inputs.draw_rows.numpy()[:] = rows
    asking = [row for row, spec in enumerate(specs) if spec.params.logprobs is not None]
    line_of = {row: line for line, row in enumerate(asking)}
    inputs.logprob_rows.numpy()[:] = asking
    inputs.logprob_draws.numpy()[:] = [draw for draw, row in enumerate(rows) if row in line_of]
    inputs.logprob_lines.numpy()[:] = [line_of[row] for row in rows if row in line_of]


def _pack_filters(specs: Sequence[SampleSpec], vocab_size: int, inputs: SampleInputs) -> None:
    """A greedy row gets no filters."""
    temperatures, top_k = inputs.temperatures.numpy(), inputs.top_k.numpy()
    top_p, min_p_cuts = inputs.top_p.numpy(), inputs.min_p_cuts.numpy()
    temperatures[:], top_k[:], top_p[:], min_p_cuts[:] = 0, 0, 1, INFINITY_DEPTH
    for row, spec in enumerate(specs):
        if _is_greedy(spec):
            continue
        params = spec.params
        temperatures[row], top_p[row] = params.temperature, params.top_p
        top_k[row] = _top_k(params, vocab_size)
        if params.min_p > 0:
            min_p_cuts[row] = np.float32(-math.log(params.min_p)).view(np.int32) & 0x7FFFFFFF


def _pack_biases(edits: Sequence[dict[int, list[float]]], inputs: SampleInputs) -> None:
    entries = [(row, token_id, values) for row, edit in enumerate(edits) for token_id, values in edit.items()]
    count = len(entries)
    rows = inputs.biased_rows.numpy()
    rows[:count], rows[count:] = [row for row, _, _ in entries], -1
    inputs.biased_ids.numpy()[:count] = [token_id for _, token_id, _ in entries]
    inputs.bias_ends.numpy()[:count] = np.cumsum([len(values) for _, _, values in entries], dtype=np.int32)
    biases = [bias for _, _, values in entries for bias in values]
    inputs.biases.numpy()[: len(biases)] = biases


def _pack_histories(specs: Sequence[SampleSpec], histories: Sequence[_History | None], inputs: SampleInputs) -> None:
    line = start = 0
    for row, (spec, history) in enumerate(zip(specs, histories, strict=True)):
        if history is None:
            continue
        end = start + len(history.token_ids)
        inputs.history_rows.numpy()[line] = row
        inputs.history_starts.numpy()[line] = start
        inputs.history_outputs.numpy()[line] = start + history.prompt_count
        inputs.history_ends.numpy()[line] = end
        inputs.repetition.numpy()[line] = spec.params.repetition_penalty
        inputs.presence.numpy()[line] = spec.params.presence_penalty
        inputs.frequency.numpy()[line] = spec.params.frequency_penalty
        inputs.history_ids.numpy()[start:end] = history.token_ids
        line, start = line + 1, end


def _rows(drawn: Drawn) -> Iterator[tuple[Sampled, ...]]:
    """From tensors in host memory."""
    token_ids = iter(drawn.token_ids.tolist())
    logprobs = iter(() if drawn.logprobs is None else drawn.logprobs.tolist())
    top_ids = iter(() if drawn.top_ids is None else drawn.top_ids.tolist())
    top_logprobs = iter(() if drawn.top_logprobs is None else drawn.top_logprobs.tolist())
    for spec in drawn.prepared.specs:
        wanted = spec.params.logprobs
        if wanted is None:
            yield tuple(Sampled(next(token_ids)) for _ in spec.choices)
            continue
        # topk says nothing about the order of equal values; here the lowest id comes first, as greedy takes it.
        pairs = zip(next(top_ids), next(top_logprobs), strict=True)
        top = tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:wanted])
        yield tuple(Sampled(next(token_ids), next(logprobs), top) for _ in spec.choices)


def _to_pinned(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None:
        return None
    return torch.empty_like(tensor, device=CPU, pin_memory=True).copy_(tensor, non_blocking=True)


def _round_up(count: int) -> int:
    """To a power of two; 0 stays 0."""
    return 1 << (count - 1).bit_length() if count else 0
