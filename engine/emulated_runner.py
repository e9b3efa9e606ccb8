"""A runner without a model: it takes as long as a cost model says, and answers a hash of the context.

The hash is read from emulated KV (engine/emulated_kv.py) through the block tables, and the right answer of every
request is known beforehand (`expected_tokens`). So whatever a scheduler, pool or transfer does wrong becomes a wrong
token, or an AssertionError that says what was wrong.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from engine.batch import PENDING_TOKEN, Batch, KVLayout, LayerListener, Row, Sampled, SampleSpec, StepOutput
from engine.emulated_kv import MASK, ROOT, EmulatedKV, extend, mix
from engine.multi_step import can_repeat
from engine.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class _Draw:
    """One token that a batch drew, for the row of the next batch that follows it at position `end` of `seq_id`."""

    seq_id: str
    end: int
    token_id: int


class EmulatedRunner:
    """Implements engine.batch.Runner on the running loop's clock.

    `layout` has dtype "uint64", one KV head and head_dim 1. `cost` gives a batch's seconds. `eos_rate` is the share of
    draws that end a sequence; without it `eos_token_id` is never drawn.
    """

    def __init__(
        self,
        layout: KVLayout,
        cost: Callable[[Batch], float],
        layer_group: int,
        *,
        vocab_size: int = 32_000,
        eos_token_id: int = 0,
        eos_rate: float = 0.0,
    ) -> None:
        assert vocab_size >= 2, "a vocabulary of end-of-sequence alone can say nothing"
        assert layer_group >= 1, "a layer group holds at least one layer"
        self._layout = layout
        self._cost = cost
        self._layer_group = layer_group
        self.vocab_size = vocab_size
        # What it draws is a hash, of no vocabulary.
        self.can_guide = False
        self.eos_token_id = eos_token_id
        self.eos_rate = eos_rate
        # The blocks of the batches under way: one, and one that waits for its end.
        self._in_use: list[frozenset[int]] = []
        self._turn = asyncio.Lock()
        self._drawn: list[_Draw] = []
        # Of the last `run_many`: steps begun, and how many there are to be.
        self._begun = self._limit = 1
        self._kv = EmulatedKV(layout)

    @property
    def layout(self) -> KVLayout:
        return self._layout

    async def run(self, batch: Batch, on_layers: LayerListener | None = None) -> StepOutput:
        """See Runner. Asserts what the real runner takes for granted: who may write what, and that all layers agree."""
        assert len(self._in_use) < 2, "a third batch was started while two are under way"
        blocks = check_ownership(batch, self._layout.block_size)
        self._in_use.append(blocks)
        try:
            # First come, first served.
            async with self._turn:
                return await self._execute(batch, on_layers)
        finally:
            self._in_use.remove(blocks)

    async def run_many(self, batch: Batch, max_steps: int) -> list[StepOutput]:
        """See engine.multi_step.MultiStepRunner. Step by step: exact, and no faster than as many calls of `run`."""
        assert max_steps >= 1, "a run has at least one step"
        self._begun, self._limit = 0, max_steps
        outputs: list[StepOutput] = []
        step = batch
        while self._begun < self._limit:
            self._begun += 1
            out = await self.run(Batch(tuple(_covered(row, self._layout.block_size) for row in step.rows), step.copies))
            outputs.append(out)
            step = Batch(tuple(_next_row(row, out.sampled[index]) for index, row in enumerate(step.rows)))
        return outputs

    def cut_short(self) -> int:
        """See engine.multi_step.MultiStepRunner."""
        assert self._begun >= 1, "a run was cut short before it began"
        self._limit = self._begun
        return self._limit

    async def _execute(self, batch: Batch, on_layers: LayerListener | None) -> StepOutput:
        drawn, self._drawn = self._drawn, []
        all_rows = [_resolve(row, drawn) for row in batch.rows]
        groups = [
            slice(first, min(first + self._layer_group, self._layout.num_layers))
            for first in range(0, self._layout.num_layers, self._layer_group)
        ]
        slice_s = self._cost(batch) / len(groups)
        if batch.copies:
            self._kv.copy(batch.copies)
        for layers in groups:
            await asyncio.sleep(slice_s)
            for rows in _waves(all_rows):
                self._kv.write_rows(rows, layers)
            if on_layers is not None:
                on_layers(layers.start, layers.stop)
        sampled = self._sample_rows(all_rows)
        self._drawn = [
            _Draw(row.seq_id, row.end, token.token_id)
            for row, tokens in zip(all_rows, sampled, strict=True)
            for token in tokens
        ]
        return StepOutput(sampled)

    def export_blocks(self, block_ids: Sequence[int], layers: range, block_tokens: int) -> bytes | memoryview:
        return self._kv.export(block_ids, layers, block_tokens)

    def import_blocks(
        self,
        block_ids: Sequence[int],
        first_slot: int,
        layers: range,
        block_tokens: int,
        payload: memoryview,
        dtype: str,
    ) -> None:
        held = sorted(frozenset().union(*self._in_use).intersection(block_ids))
        assert not held, f"KV is received into blocks {held}, which a batch under way uses"
        self._kv.store(block_ids, first_slot, layers, block_tokens, payload, dtype)

    async def close(self) -> None:
        assert not self._in_use, "the runner was closed while a batch is under way"

    def expected_tokens(
        self, prompt_ids: Sequence[int], params: SamplingParams, seed: int, choice: int, count: int
    ) -> list[int]:
        """The one right answer: the first `count` tokens that follow `prompt_ids`, worked out from scratch."""
        last, digest, position = ROOT, 0, 0
        output: list[int] = []
        pending = list(prompt_ids)
        for step in range(count):
            for token_id in pending:
                last, digest = extend(last, digest, position, token_id)
                position += 1
            pending = [self._draw(last, digest, params, seed, choice, step)]
            output += pending
        return output

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _sample_rows(self, rows: Sequence[Row]) -> tuple[tuple[Sampled, ...], ...]:
        asked = [row for row in rows if row.sample is not None]
        if not asked:
            return tuple(() for _ in rows)
        contexts = iter(zip(self._kv.ends(asked), self._kv.digests(asked), strict=True))
        return tuple(self._sample(row.sample, *next(contexts)) if row.sample else () for row in rows)

    def _sample(self, spec: SampleSpec, last: int, digest: int) -> tuple[Sampled, ...]:
        has_history = not spec.params.needs_history or len(spec.output_ids) == spec.step
        assert has_history, f"token {spec.step} is drawn with a history of {len(spec.output_ids)} tokens"
        drawn = (self._draw(last, digest, spec.params, spec.seed, choice, spec.step) for choice in spec.choices)
        return tuple(self._described(token_id, spec.params) for token_id in drawn)

    def _draw(self, last: int, digest: int, params: SamplingParams, seed: int, choice: int, step: int) -> int:
        context = mix(last ^ mix(digest))
        if not params.is_greedy:
            context ^= mix(mix(mix(seed & MASK) ^ choice) ^ step)
        # 53 bits, as a double holds them.
        if step >= params.min_tokens and mix(context) >> 11 < self.eos_rate * (1 << 53):
            return self.eos_token_id
        token_id = context % (self.vocab_size - 1)
        return token_id + (token_id >= self.eos_token_id)

    def _described(self, token_id: int, params: SamplingParams) -> Sampled:
        if params.logprobs is None:
            return Sampled(token_id)
        others = ((token_id + rank) % self.vocab_size for rank in range(params.logprobs))
        return Sampled(token_id, -1.0, tuple((other, -1.0 - rank) for rank, other in enumerate(others)))


def check_ownership(batch: Batch, block_size: int) -> frozenset[int]:
    """The blocks that `batch` uses. AssertionError when two rows write one block, or one reads what another writes,
    or a table is too short, or copies depend on one another."""
    targets = [target for _, target in batch.copies]
    assert len(set(targets)) == len(targets), f"copies {batch.copies} write a block twice"
    assert not {source for source, _ in batch.copies} & set(targets), f"copies {batch.copies} depend on their order"
    tables = [set(row.block_ids) for row in batch.rows]
    writers: dict[int, str] = {}
    for row, table in zip(batch.rows, tables, strict=True):
        assert len(row.token_ids) > 0, f"{row.seq_id}: a row without tokens"
        assert len(row.block_ids) * block_size >= row.end, f"{row.seq_id}: {row.end} tokens in {row.block_ids}"
        assert len(table) == len(row.block_ids), f"{row.seq_id}: a block twice in {row.block_ids}"
        for block_id in row.block_ids[row.start // block_size : (row.end - 1) // block_size + 1]:
            writer = writers.setdefault(block_id, row.seq_id)
            assert writer == row.seq_id, f"{writer} and {row.seq_id} both write block {block_id}"
    for row, table in zip(batch.rows, tables, strict=True):
        for block_id in table & writers.keys():
            assert writers[block_id] == row.seq_id, (
                f"{row.seq_id} reads block {block_id}, {writers[block_id]} writes it"
            )
    return frozenset().union(*batch.copies, *tables)


def _resolve(row: Row, drawn: Sequence[_Draw]) -> Row:
    """`row` with the token that it follows. AssertionError when that is not its own sequence's next one."""
    if row.follows is None:
        assert PENDING_TOKEN not in row.token_ids, f"{row.seq_id}: a token that nobody has drawn"
        return row
    assert tuple(row.token_ids) == (PENDING_TOKEN,), f"{row.seq_id}: {row.token_ids} and a draw besides"
    assert row.follows < len(drawn), f"{row.seq_id} follows draw {row.follows}, the batch before made {len(drawn)}"
    draw = drawn[row.follows]
    assert (draw.seq_id, draw.end) == (row.seq_id, row.start), (
        f"{row.seq_id} at {row.start} follows a draw of {draw.seq_id} at {draw.end}"
    )
    return replace(row, token_ids=(draw.token_id,))


def _covered(row: Row, block_size: int) -> Row:
    """`row` without the blocks after its end, which a later step of the same run would use."""
    return replace(row, block_ids=row.block_ids[: -(-row.end // block_size)])


def _next_row(row: Row, drawn: tuple[Sampled, ...]) -> Row:
    """The row that computes what `row` drew."""
    assert row.sample is not None, f"{row.seq_id} draws nothing and cannot be repeated"
    assert len(row.token_ids) == len(drawn) == 1, f"{row.seq_id} is no decode row"
    assert can_repeat(row.sample.params), f"{row.seq_id} may end by what it draws, and nobody looks"
    sample = replace(row.sample, step=row.sample.step + 1)
    return replace(row, token_ids=(drawn[0].token_id,), start=row.end, sample=sample)


def _waves(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Rows that may run side by side: all of them, or one by one where a sequence has several."""
    if len({row.seq_id for row in rows}) == len(rows):
        yield rows
    else:
        yield from ([row] for row in rows)
