"""The sending end of one KV stream: what is published, in which order it leaves, and what has left.

Published runs are kept by reference (block ids and layers), not by content: bytes are read from the KV cache only when
the transport asks for the next frame. So a reader that stalls costs no memory beyond the blocks, which the stream holds
anyway: the prefill worker's KV pool is the queue.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass

from engine.batch import Runner
from engine.errors import TandemError
from kvtransfer.frames import Begin, End, FirstToken, Frame, KVBlocks, KVRange


@dataclass(frozen=True, slots=True)
class _Run:
    """Written KV: blocks in token order from `first_token` up to `end_token`, in layers [first_layer, end_layer)."""

    block_ids: Sequence[int]
    first_token: int
    end_token: int
    first_layer: int
    end_layer: int

    @property
    def slots(self) -> int:
        """Of all layers together."""
        return (self.end_token - self.first_token) * (self.end_layer - self.first_layer)


class KVSender:
    """One stream's outbox. The worker's loop publishes; the transport pulls `frames()`, one at a time. Of what is
    published only what lies in `wanted` is sent, unless that is empty: ranges of whole blocks that do not overlap.
    Without `wants_kv` nothing is: the first token and the end are all there is to it.
    `ended_s` is when the last frame was asked for, None before; `published_bytes` counts what was to be sent."""

    def __init__(
        self, runner: Runner, max_frame_bytes: int, wanted: Sequence[KVRange] = (), *, wants_kv: bool = True
    ) -> None:
        self._runner = runner
        self._layout = runner.layout
        self._max_frame_bytes = max_frame_bytes
        self._wanted = wanted
        self._wants_kv = wants_kv
        self._urgent: deque[Begin | FirstToken] = deque()
        self._runs: deque[_Run] = deque()
        self._wake = asyncio.Event()
        self._published_all = False
        self._error: TandemError | None = None
        self.published_bytes = 0
        self.ended_s: float | None = None
        self._sent_bytes = 0
        self._sent_before_first_token = 0

    @property
    def is_sent(self) -> bool:
        """Whether all that was to be sent has been."""
        return self.ended_s is not None

    def begin(self, frame: Begin) -> None:
        """Opens the stream: the prompt is about to run."""
        self._urgent.append(frame)
        self._wake.set()

    def publish(self, block_ids: Sequence[int], first_token: int, end_token: int, layers: range) -> None:
        """Offers the KV of tokens [first_token, end_token) in `layers`. `block_ids` start with `first_token`'s block;
        `end_token` ends a block or the prompt. The blocks must stay unchanged until the stream ends."""
        if first_token >= end_token or not self._wants_kv:
            return
        run = _Run(tuple(block_ids), first_token, end_token, layers.start, layers.stop)
        parts = [run]
        if self._wanted:
            parts = [part for wanted in self._wanted if (part := self._common(run, wanted)) is not None]
        self._runs.extend(parts)
        self.published_bytes += sum(part.slots for part in parts) * self._layout.token_bytes
        self._wake.set()

    def first_token(self, frame: FirstToken) -> None:
        """Sends the first token ahead of KV still waiting. Everything is published by now, so `End` follows the KV."""
        self._sent_before_first_token = self._sent_bytes
        self._urgent.append(frame)
        self._published_all = True
        self._wake.set()

    def fail(self, error: TandemError) -> None:
        """Ends the stream with an error instead."""
        self._error = error
        self._wake.set()

    async def frames(self) -> AsyncGenerator[Frame, None]:
        """Frames in sending order. What is yielded counts as sent when the transport asks for the next one."""
        pending: Iterator[KVBlocks] = iter(())
        while True:
            if self._error is not None:
                raise self._error
            if self._urgent:
                yield self._urgent.popleft()
            elif (block_frame := next(pending, None)) is not None:
                yield block_frame
                self._sent_bytes += len(block_frame.payload)
            elif self._runs:
                pending = self._cut(self._runs.popleft())
            elif self._published_all:
                # Its reader may close the stream over this, the last frame.
                self.ended_s = asyncio.get_running_loop().time()
                yield End(self._sent_bytes, self._sent_before_first_token)
                return
            else:
                self._wake.clear()
                await self._wake.wait()

    def _common(self, run: _Run, wanted: KVRange) -> _Run | None:
        first, end = max(run.first_token, wanted.first_token), min(run.end_token, wanted.end_token)
        first_layer, end_layer = max(run.first_layer, wanted.first_layer), min(run.end_layer, wanted.end_layer)
        if first >= end or first_layer >= end_layer:
            return None
        skipped = (first - run.first_token) // self._layout.block_size
        return _Run(run.block_ids[skipped:], first, end, first_layer, end_layer)

    def _cut(self, run: _Run) -> Iterator[KVBlocks]:
        """Frames of at most `max_frame_bytes` (but at least one block of one layer): by layers, then by blocks."""
        block_size = self._layout.block_size
        full_blocks = (run.end_token - run.first_token) // block_size
        layer_bytes = max(1, full_blocks) * block_size * self._layout.token_bytes
        layers_each = max(1, self._max_frame_bytes // layer_bytes)
        blocks_each = max(1, self._max_frame_bytes // (block_size * self._layout.token_bytes))
        tail_tokens = (run.end_token - run.first_token) % block_size
        for first_layer in range(run.first_layer, run.end_layer, layers_each):
            layers = range(first_layer, min(first_layer + layers_each, run.end_layer))
            for start in range(0, full_blocks, blocks_each):
                block_ids = run.block_ids[start : min(start + blocks_each, full_blocks)]
                yield self._read(block_ids, run.first_token + start * block_size, block_size, layers)
            if tail_tokens:
                tail_start = run.first_token + full_blocks * block_size
                yield self._read(run.block_ids[full_blocks : full_blocks + 1], tail_start, tail_tokens, layers)

    def _read(self, block_ids: Sequence[int], first_token: int, block_tokens: int, layers: range) -> KVBlocks:
        payload = self._runner.export_blocks(block_ids, layers, block_tokens)
        return KVBlocks(first_token, len(block_ids), block_tokens, layers.start, len(layers), payload)
