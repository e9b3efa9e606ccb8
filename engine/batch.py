"""What a scheduler hands to a runner, and what it gets back: plain frozen values, no tensors.

A batch is ragged: each row brings some new tokens of one sequence, at some position, and the block table to read and
write through. A row of one token is a decode step, a longer one a prefill chunk; one batch may hold both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.errors import InvalidArgument
from engine.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """Draw token number `step` (0 = first) of a sequence from the logits of a row's last token.

    `choices` are the choice indices to draw for: (i,) while decoding, (0, …, n−1) at the end of a prompt with n > 1.
    `prompt_ids` and `output_ids` are read only when `params.needs_history`.
    """

    params: SamplingParams
    seed: int
    step: int
    choices: tuple[int, ...] = (0,)
    prompt_ids: Sequence[int] = ()
    output_ids: Sequence[int] = ()

    def problem(self, drawn: Sequence[Sampled]) -> InvalidArgument | None:
        """Why what was drawn for it are no tokens, None where they are."""
        if drawn[0].token_id != NO_TOKEN:
            return None
        assert self.params.structure is not None, "only where a structure is lost nothing can be drawn"
        return self.params.structure.lost(self.step)


# Stands for a draw of a row that cannot be held to its structure any further: its request is to fail. No vocabulary has
# it.
NO_TOKEN = -1
# Stands in a row's `token_ids` for a token that is not drawn yet. No vocabulary has it: nobody can take it for one.
PENDING_TOKEN = -1


@dataclass(frozen=True, slots=True)
class Row:
    """New tokens of one sequence: positions [start, start + len(token_ids)); `block_ids` covers all of [0, end).

    `follows`: the row's one token is draw number `follows` of the batch handed to the runner just before this one,
    which may not have ended yet; `token_ids` is then (PENDING_TOKEN,). Draws are numbered from 0 in row order, and
    within a row in the order of its choices.
    """

    seq_id: str
    token_ids: Sequence[int]
    start: int
    block_ids: Sequence[int]
    sample: SampleSpec | None = None
    follows: int | None = None

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass. `copies` (source block, target block) run before it: what copy-on-write owes."""

    rows: tuple[Row, ...]
    copies: tuple[tuple[int, int], ...] = ()

    @property
    def token_count(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)


@dataclass(frozen=True, slots=True)
class Sampled:
    """One drawn token. `logprob` is of the unmodified distribution (temperature 1, no filters), natural log.

    `top` holds the most likely tokens as (token_id, logprob), most likely first; empty unless asked for.
    """

    token_id: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StepOutput:
    """`sampled[r]` holds one entry per choice of row r's SampleSpec, and is empty for a row without one. NO_TOKEN is in
    none of a row's entries or in all."""

    sampled: tuple[tuple[Sampled, ...], ...]


# Size of one element of a KV cache, by the dtype names that KVLayout uses.
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3": 1, "uint64": 8}


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What one worker's KV cache is made of; two workers can exchange KV when `matches` says so.

    A (layer, block) is one contiguous run of shape [2, block_size, num_kv_heads, head_dim], K first.
    `dtype` is the element type's name ("float32", "bfloat16"). Block size, dtype and pool size may differ.
    """

    model: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    block_size: int
    num_blocks: int

    def matches(self, other: KVLayout) -> bool:
        return self.shape == other.shape

    @property
    def shape(self) -> tuple[str, int, int, int]:
        return (self.model, self.num_layers, self.num_kv_heads, self.head_dim)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K and V in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * ELEMENT_BYTES[self.dtype]


# Called on the event loop's thread when layers [first, last) of the running batch have their KV in the cache.
LayerListener = Callable[[int, int], None]


class Runner(Protocol):
    """Executes batches, one after another, and reads and writes KV blocks for the KV stream.

    Real: torch in one dedicated thread. In-memory: a cost model that sleeps on the event loop's clock.
    """

    @property
    def layout(self) -> KVLayout: ...

    @property
    def vocab_size(self) -> int:
        """Token ids are in [0, vocab_size): others would index out of the model's tables, and end the worker."""
        ...

    @property
    def can_guide(self) -> bool:
        """Whether it can hold answers to a structure (`SamplingParams.structure`). Rows with one may only come then."""
        ...

    async def run(self, batch: Batch, on_layers: LayerListener | None = None) -> StepOutput:
        """Runs one forward pass. All calls of `on_layers` come before this returns, in layer order, together
        covering every layer once.

        May be called while one other run is under way, never while two are: batches execute one after another in the
        order of the calls, copies included, and the calls of `on_layers` keep that order too. A row that `follows` a
        draw refers to the batch of the call before this one, ended or not; when that one failed, this one fails as
        well. Blocks of a batch belong to the runner until its `run` has returned or raised."""
        ...

    def export_blocks(self, block_ids: Sequence[int], layers: range, block_tokens: int) -> bytes | memoryview:
        """The raw KV of the first `block_tokens` slots of each block: [len(layers), len(block_ids), 2, block_tokens,
        num_kv_heads, head_dim], C order, in `layout.dtype`. The result is a copy: the blocks may change afterwards."""
        ...

    def import_blocks(
        self,
        block_ids: Sequence[int],
        first_slot: int,
        layers: range,
        block_tokens: int,
        payload: memoryview,
        dtype: str,
    ) -> None:
        """Writes what some `export_blocks` gave. `payload` holds source blocks of `block_tokens` tokens each, in
        `dtype`; their tokens go one after another into the slots of `block_ids`, starting at slot `first_slot` of the
        first. The two sides' block sizes need not agree. Raises TransferFailed when the payload's size is wrong."""
        ...

    async def close(self) -> None: ...
