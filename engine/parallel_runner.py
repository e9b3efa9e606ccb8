"""The Runner of a worker of several ranks, on the leader: tells the others what to run, and runs its own share.

    event loop     run ────────────────────────────────────────── on_layers … returns
    leader         └ tell the others │ its share of each layer │ … │ logits from all │ sample ┘
    other ranks                      └ their share of each layer │ … │ part of logits ┘

It looks like a runner of one rank: `layout` has all KV heads and all layers, so peers need not know. Once any rank has
failed in a pass, ranks may be out of step, and every later call raises RankLost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine.batch import Batch, KVLayout, LayerListener, StepOutput
from engine.kv_cache import KVCache
from engine.parallel_blocks import ParallelBlocks
from engine.parallel_model import ParallelModel
from engine.rank_messages import STOP, batch_message
from engine.ranks import RankLost, Ranks
from engine.sampler import Sampler
from engine.shard import Shard
from engine.torch_runner import TorchRunner


class LeaderRunner(TorchRunner):
    """The leader's own share: every pass begins by telling the other ranks of it, in the thread that runs it."""

    def __init__(
        self,
        model: ParallelModel,
        cache: KVCache,
        sampler: Sampler,
        ranks: Ranks,
        *,
        device: torch.device,
        layer_group: int,
        bind: Callable[[], None],
    ) -> None:
        super().__init__(model, cache, sampler, device=device, layer_group=layer_group, bind=bind)
        self._parallel_model = model
        self._ranks = ranks
        self.problem: BaseException | None = None

    def logits(self, batch: Batch, on_layers: LayerListener | None = None) -> torch.Tensor:
        self.check()
        try:
            message = batch_message(batch)
            for rank in range(1, self._ranks.member.size):
                self._ranks.control.send_message(message, rank)
            self._parallel_model.only_leader_knows_tokens = bool(message["only_leader_knows_tokens"])
            self._parallel_model.on_remote_layers = on_layers
            return super().logits(batch, on_layers)
        except BaseException as error:
            self.give_up(error)
            raise

    def check(self) -> None:
        if self.problem is not None:
            raise RankLost(f"the ranks of this worker are out of step since: {self.problem}")

    def give_up(self, problem: BaseException) -> None:
        """Lets go of the other ranks, which then end."""
        self.problem = self.problem or problem
        self._ranks.close()


class ParallelRunner:
    """See `Runner` in engine/batch.py for the contract. `layout` is the whole worker's, `shards` all ranks'."""

    def __init__(self, layout: KVLayout, shards: Sequence[Shard], local: LeaderRunner, ranks: Ranks) -> None:
        self._layout = layout
        self._local = local
        self._ranks = ranks
        self._blocks = ParallelBlocks(layout, shards, local, ranks.blocks)

    @property
    def layout(self) -> KVLayout:
        return self._layout

    @property
    def vocab_size(self) -> int:
        return self._local.vocab_size

    @property
    def can_guide(self) -> bool:
        return self._local.can_guide

    async def run(self, batch: Batch, on_layers: LayerListener | None = None) -> StepOutput:
        """Runs one forward pass on all ranks. Raises RankLost when one of them died."""
        return await self._local.run(batch, on_layers)

    def logits(self, batch: Batch, on_layers: LayerListener | None = None) -> torch.Tensor:
        """As `TorchRunner.logits`."""
        return self._local.logits(batch, on_layers)

    def export_blocks(self, block_ids: Sequence[int], layers: range, block_tokens: int) -> memoryview:
        """May be called from any thread while a forward pass writes other blocks or later layers."""
        self._local.check()
        try:
            return self._blocks.export_blocks(block_ids, layers, block_tokens)
        except RankLost as error:
            self._local.give_up(error)
            raise

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
        self._local.check()
        try:
            self._blocks.import_blocks(block_ids, first_slot, layers, block_tokens, payload, dtype)
        except RankLost as error:
            self._local.give_up(error)
            raise

    async def close(self) -> None:
        """Waits for a forward pass under way, then ends the other ranks and this one's thread."""
        await self._local.close()
        if self._local.problem is None:
            try:
                for rank in range(1, self._ranks.member.size):
                    self._ranks.control.send_message(STOP, rank)
                    self._ranks.blocks.send_message(STOP, rank)
            except RankLost:
                # It has ended already, and the others end when the connections do.
                pass
        self._ranks.close()
