"""KV blocks of a worker of several ranks, as if its cache were one: the leader gathers shares and hands them out.

leader   ask all that hold some of it ─ read its own share ─ put the answers into place          export
         send all their share ─ write its own ─ wait until all have written theirs               import
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from engine.batch import ELEMENT_BYTES, KVLayout
from engine.kv_cache import count_payload
from engine.rank_messages import Export, Import, request_of
from engine.ranks import Group
from engine.shard import Shard

LEADER = 0
DONE = 1

Bytes = npt.NDArray[np.uint8]


class Blocks(Protocol):
    """One rank's own blocks: two verbs of `Runner`."""

    def export_blocks(self, block_ids: Sequence[int], layers: range, block_tokens: int) -> bytes | memoryview: ...

    def import_blocks(
        self,
        block_ids: Sequence[int],
        first_slot: int,
        layers: range,
        block_tokens: int,
        payload: memoryview,
        dtype: str,
    ) -> None: ...


class ParallelBlocks:
    """The leader's view. `layout` is the whole worker's. From any thread: callers take turns on the connections."""

    def __init__(self, layout: KVLayout, shards: Sequence[Shard], own: Blocks, group: Group) -> None:
        self._layout, self._shards, self._own, self._group = layout, shards, own, group
        self._turn = Lock()

    def export_blocks(self, block_ids: Sequence[int], layers: range, block_tokens: int) -> memoryview:
        """As `Runner.export_blocks`."""
        layout, ids = self._layout, list(block_ids)
        head_bytes = layout.head_dim * ELEMENT_BYTES[layout.dtype]
        shape = (len(layers), len(ids), 2, block_tokens, layout.num_kv_heads, head_bytes)
        whole: Bytes = np.empty(shape, dtype=np.uint8)
        pieces = self._pieces(layers, each_once=True)
        with self._turn:
            for rank, shared in pieces.items():
                if rank != LEADER:
                    local = self._local(rank, shared)
                    self._group.send_message(Export(ids, local.start, local.stop, block_tokens).message(), rank)
            for rank, shared in pieces.items():
                target = self._share(whole, layers, rank, shared)
                if rank == LEADER:
                    raw = self._own.export_blocks(ids, self._local(rank, shared), block_tokens)
                    target[...] = np.frombuffer(raw, dtype=np.uint8).reshape(target.shape)
                else:
                    received = torch.empty(target.shape, dtype=torch.uint8)
                    self._group.receive(received, rank)
                    target[...] = received.numpy()
        return whole.reshape(-1).data

    def import_blocks(
        self,
        block_ids: Sequence[int],
        first_slot: int,
        layers: range,
        block_tokens: int,
        payload: memoryview,
        dtype: str,
    ) -> None:
        """As `Runner.import_blocks`."""
        count = count_payload(self._layout, block_ids, first_slot, layers, block_tokens, payload, dtype)
        head_bytes = self._layout.head_dim * ELEMENT_BYTES[dtype]
        shape = (len(layers), count, 2, block_tokens, self._layout.num_kv_heads, head_bytes)
        whole: Bytes = np.frombuffer(payload, dtype=np.uint8).reshape(shape)
        pieces = self._pieces(layers, each_once=False)
        ids = list(block_ids)
        with self._turn:
            for rank, shared in pieces.items():
                local = self._local(rank, shared)
                # A copy: a share of the heads is not contiguous, and the payload may be read-only.
                share = self._share(whole, layers, rank, shared).copy().reshape(-1)
                if rank == LEADER:
                    self._own.import_blocks(ids, first_slot, local, block_tokens, share.data, dtype)
                    continue
                order = Import(ids, first_slot, local.start, local.stop, block_tokens, dtype, len(share))
                self._group.send_message(order.message(), rank)
                self._group.send(torch.from_numpy(share), rank)
            for rank in pieces:
                if rank != LEADER:
                    self._group.receive(torch.empty(1, dtype=torch.uint8), rank)

    def _pieces(self, layers: range, *, each_once: bool) -> dict[int, range]:
        """The layers that each rank shares in, by rank. `each_once`: of ranks with the same KV heads only the first."""
        found: dict[int, range] = {}
        seen = set()
        for rank, shard in enumerate(self._shards):
            shared = range(max(layers.start, shard.layers.start), min(layers.stop, shard.layers.stop))
            what = (shard.layers, shard.kv_heads)
            if shared and not (each_once and what in seen):
                found[rank] = shared
                seen.add(what)
        return found

    def _local(self, rank: int, layers: range) -> range:
        first = self._shards[rank].layers.start
        return range(layers.start - first, layers.stop - first)

    def _share(self, whole: Bytes, layers: range, rank: int, shared: range) -> Bytes:
        """The part of `whole`, which holds `layers`, that is of one rank."""
        heads = self._shards[rank].kv_heads
        first = layers.start
        return whole[shared.start - first : shared.stop - first, ..., heads.start : heads.stop, :]


def serve_blocks(own: Blocks, group: Group) -> None:
    """Any other rank's side: does as the leader says until it says stop. Raises RankLost when it is gone."""
    while (request := request_of(group.receive_message(LEADER))) is not None:
        layers = range(request.first_layer, request.end_layer)
        match request:
            case Export():
                raw = own.export_blocks(request.block_ids, layers, request.block_tokens)
                group.send(torch.frombuffer(bytearray(raw), dtype=torch.uint8), LEADER)
            case Import():
                received = torch.empty(request.byte_count, dtype=torch.uint8)
                group.receive(received, LEADER)
                payload = received.numpy().data
                own.import_blocks(
                    request.block_ids, request.first_slot, layers, request.block_tokens, payload, request.dtype
                )
                group.send(torch.tensor([DONE], dtype=torch.uint8), LEADER)
