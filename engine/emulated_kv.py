"""The KV of the emulated runner: chains of hashes in place of keys and values.

Position p of a sequence stores h(p) = h(p−1)·M + g(token p) mod 2^64 in every layer, as K and as V, each masked
differently, so that a layer or a half in the wrong place shows. What a context amounts to is

    h of its last position, read through the block table, and  D = Σ (2p+1)·h(p) over the whole context,

so an error of paging, copy-on-write, transfer or reuse anywhere in it, in any layer, changes the result. To keep a
decode step cheap, D is added up from two running sums per (layer, block), kept up to date by whatever writes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.batch import KVLayout, Row
from engine.errors import TransferFailed

U64 = NDArray[np.uint64]
MASK = (1 << 64) - 1
MULTIPLIER = 0xD1342543DE82EF95
INVERSE = pow(MULTIPLIER, -1, 1 << 64)
# h(−1): what position 0 continues.
ROOT = 0x9E3779B97F4A7C15
# D counts K once and V twice: an equal error in both does not cancel.
KV_WEIGHT = 3


def mix(value: int) -> int:
    """A 64-bit finaliser (splitmix64, Steele et al. 2014): every bit of `value` reaches every bit of the result."""
    value = (value + ROOT) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def mix_array(values: U64) -> U64:
    """`mix` of every element."""
    values = values + np.uint64(ROOT)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def extend(last: int, digest: int, position: int, token_id: int) -> tuple[int, int]:
    """(h, D) of a context that grows by `token_id` at `position`, worked out from scratch. Starts as (ROOT, 0)."""
    last = (last * MULTIPLIER + mix(token_id)) & MASK
    return last, (digest + KV_WEIGHT * (2 * position + 1) * last) & MASK


class EmulatedKV:
    """Masked hashes [layers, blocks, 2, slots] of `layout`, which has dtype "uint64", one KV head and head_dim 1."""

    def __init__(self, layout: KVLayout) -> None:
        assert (layout.dtype, layout.num_kv_heads, layout.head_dim) == ("uint64", 1, 1), f"{layout} cannot hold hashes"
        layers, blocks, size = layout.num_layers, layout.num_blocks, layout.block_size
        self._block_size = size
        # New blocks hold noise, the same in every run.
        self._kv = np.random.default_rng(0).integers(0, MASK, (layers, blocks, 2, size), np.uint64, endpoint=True)
        self._masks = np.array([[[mix(2 * i)], [mix(2 * i + 1)]] for i in range(layers)], np.uint64)
        self._slots = np.arange(size)
        self._odd = np.arange(1, 2 * size, 2, dtype=np.uint64)
        # Σ h and Σ (2·slot+1)·h over a block's slots, [layers, blocks], K + 2V.
        self._sums = np.zeros((layers, blocks), np.uint64)
        self._slot_sums = np.zeros((layers, blocks), np.uint64)
        self._resum(slice(None), slice(0, layers))

    def export(self, block_ids: Sequence[int], layers: range, block_tokens: int) -> bytes | memoryview:
        taken = self._kv[layers.start : layers.stop, list(block_ids), :, :block_tokens]
        return taken.tobytes()

    def store(
        self,
        block_ids: Sequence[int],
        first_slot: int,
        layers: range,
        block_tokens: int,
        payload: memoryview,
        dtype: str,
    ) -> None:
        size, payload_bytes = self._block_size, memoryview(payload).nbytes
        block_bytes = len(layers) * 2 * block_tokens * self._kv.itemsize
        if dtype != "uint64" or min(block_bytes, payload_bytes) == 0 or payload_bytes % block_bytes:
            raise TransferFailed(f"{payload_bytes} bytes of {dtype} are not KV hashes in blocks of {block_bytes} bytes")
        source = np.frombuffer(payload, np.uint64).reshape(len(layers), -1, 2, block_tokens)
        tokens = source.shape[1] * block_tokens
        if first_slot + tokens > len(block_ids) * size:
            raise TransferFailed(f"{tokens} tokens from slot {first_slot} do not fit into {len(block_ids)} blocks")
        in_order = source.transpose(0, 2, 1, 3).reshape(len(layers), 2, tokens)
        self._write_run(block_ids, first_slot, slice(layers.start, layers.stop), in_order)

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        sources, targets = [source for source, _ in copies], [target for _, target in copies]
        for array in (self._kv, self._sums, self._slot_sums):
            array[:, targets] = array[:, sources]

    def write_rows(self, rows: Sequence[Row], layers: slice) -> None:
        """Continues each row's chain, in every layer from that layer's own last hash, K from K and V from V."""
        steps = [row for row in rows if len(row.token_ids) == 1]
        if steps:
            self._write_steps(steps, layers)
        for row in rows:
            if len(row.token_ids) > 1:
                tokens = mix_array(np.array(row.token_ids, np.uint64))
                count = len(tokens)
                # h(s+i) = M^(i+1) · (h(s−1) + Σ_{j≤i} g_j · M^−(j+1)): numpy runs along the chain.
                sums = self._last_hashes([row], layers)[0, :, :, None] + np.cumsum(tokens * _powers(INVERSE, count))
                self._write_run(
                    row.block_ids, row.start, layers, sums * _powers(MULTIPLIER, count) ^ self._masks[layers]
                )

    def _write_steps(self, rows: Sequence[Row], layers: slice) -> None:
        """`_write_rows` for rows of one token, all at once: a decode step is made of these."""
        tokens = mix_array(np.array([row.token_ids[0] for row in rows], np.uint64))
        blocks, slots = self._places(rows, 0)
        masks = self._masks[layers, :, 0]
        new = self._last_hashes(rows, layers) * np.uint64(MULTIPLIER) + tokens[:, None, None]
        change = new - (self._kv[layers, blocks, :, slots] ^ masks)
        self._kv[layers, blocks, :, slots] = new ^ masks
        both = (change[:, :, 0] + change[:, :, 1] * np.uint64(2)).T
        self._sums[layers, blocks] += both
        self._slot_sums[layers, blocks] += both * (slots * 2 + 1).astype(np.uint64)

    def _write_run(self, block_ids: Sequence[int], first_slot: int, layers: slice, masked: U64) -> None:
        """Stores `masked` [layers, 2, tokens] from slot `first_slot` of `block_ids` on."""
        size = self._block_size
        slots = np.arange(first_slot, first_slot + masked.shape[-1])
        touched = block_ids[slots[0] // size : slots[-1] // size + 1]
        blocks = np.array(block_ids)[slots // size]
        self._kv[layers, blocks, :, slots % size] = masked.transpose(2, 0, 1)
        self._resum(list(touched), layers)

    def _resum(self, block_ids: list[int] | slice, layers: slice) -> None:
        hashes = self._kv[layers, block_ids] ^ self._masks[layers, None]
        both = hashes[:, :, 0] + hashes[:, :, 1] * np.uint64(2)
        self._sums[layers, block_ids] = both.sum(-1)
        self._slot_sums[layers, block_ids] = (both * self._odd).sum(-1)

    def _places(self, rows: Sequence[Row], offset: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Block and slot of position start + `offset` of each row (of position 0 where that is before it)."""
        size = self._block_size
        positions = [max(row.start + offset, 0) for row in rows]
        blocks = [row.block_ids[position // size] for row, position in zip(rows, positions, strict=True)]
        return np.array(blocks), np.array(positions) % size

    def _last_hashes(self, rows: Sequence[Row], layers: slice) -> U64:
        """What each row's chain continues: h(start − 1) [rows, layers, 2], read through the block table."""
        blocks, slots = self._places(rows, -1)
        hashes: U64 = self._kv[layers, blocks, :, slots] ^ self._masks[layers, :, 0]
        hashes[[row.start == 0 for row in rows]] = ROOT
        return hashes

    def ends(self, rows: Sequence[Row]) -> list[int]:
        """h of each row's last position. AssertionError where the layers, or K and V, disagree about it."""
        size = self._block_size
        blocks = np.array([row.block_ids[(row.end - 1) // size] for row in rows])
        slots = np.array([(row.end - 1) % size for row in rows])
        hashes = self._kv[:, blocks, :, slots] ^ self._masks[:, :, 0]
        odd = (hashes != hashes[:, :1, :1]).any(-1)
        for index, layer in np.argwhere(odd)[:1]:
            row = rows[index]
            raise AssertionError(f"{row.seq_id}: layer {layer} disagrees with layer 0's K about token {row.end - 1}")
        return [int(value) for value in hashes[:, 0, 0]]

    def digests(self, rows: Sequence[Row]) -> list[int]:
        """D of each row's whole context, K + 2V. AssertionError where the layers disagree about it."""
        size = self._block_size
        full = np.array([row.end // size for row in rows])
        blocks = np.array([block for row in rows for block in row.block_ids[: row.end // size]], np.int64)
        ends = np.cumsum(full)
        first_positions = (np.arange(len(blocks)) - np.repeat(ends - full, full)) * size
        parts = self._sums[:, blocks] * (first_positions * 2).astype(np.uint64) + self._slot_sums[:, blocks]
        totals = np.concatenate([np.zeros((len(parts), 1), np.uint64), np.cumsum(parts, axis=1)], axis=1)
        digests = totals[:, ends] - totals[:, ends - full]
        # The last block counts up to the row's end only.
        tails = np.array([row.block_ids[(row.end - 1) // size] for row in rows])
        hashes = self._kv[:, tails] ^ self._masks[:, None]
        both = hashes[:, :, 0] + hashes[:, :, 1] * np.uint64(2)
        tail_tokens = np.array([row.end % size for row in rows])
        weights = ((full * size * 2).astype(np.uint64)[:, None] + self._odd) * (self._slots < tail_tokens[:, None])
        digests += (both * weights).sum(-1)
        for layer, index in np.argwhere(digests != digests[:1])[:1]:
            row = rows[index]
            raise AssertionError(f"{row.seq_id}: layer {layer} disagrees with layer 0 about tokens [0, {row.end})")
        return [int(value) for value in digests[0]]


def _powers(base: int, count: int) -> U64:
    """base^1 … base^count mod 2^64."""
    return np.multiply.accumulate(np.full(count, base, np.uint64))
