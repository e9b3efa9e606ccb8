"""What every runner over a `KVCache` has alike: its layout and vocabulary, its blocks on the wire, and how
layers are announced."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from engine.batch import KVLayout, LayerListener
from engine.kv_cache import KVCache


class CachedRunner:
    """The part of `Runner` (engine/batch.py) that does not compute."""

    def __init__(self, cache: KVCache, vocab_size: int) -> None:
        self._cache = cache
        self.vocab_size = vocab_size

    @property
    def layout(self) -> KVLayout:
        return self._cache.layout

    def export_blocks(self, block_ids: Sequence[int], layers: range, block_tokens: int) -> memoryview:
        """May be called from any thread while a forward pass writes other blocks or later layers."""
        return self._cache.export_blocks(block_ids, layers, block_tokens)

    def import_blocks(
        self,
        block_ids: Sequence[int],
        first_slot: int,
        layers: range,
        block_tokens: int,
        payload: memoryview,
        dtype: str,
    ) -> None:
        """May be called from any thread while a forward pass works on other blocks."""
        self._cache.import_blocks(block_ids, first_slot, layers, block_tokens, payload, dtype)


def on_loop(on_layers: LayerListener | None) -> Callable[[int, int], None]:
    """A listener to be called in another thread, which calls `on_layers` on the running event loop."""
    loop = asyncio.get_running_loop()

    def announce(first: int, end: int) -> None:
        if on_layers is not None:
            loop.call_soon_threadsafe(on_layers, first, end)

    return announce
