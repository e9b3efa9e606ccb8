"""The model of one rank of several: `Model` on a share of the weights, and what passes from stage to stage.

    stage 0    embed ─ layers ─ send hidden                                             logits ◀ parts of the head
    stage 1                      receive hidden ─ layers ─ norm, part of the head ─ send ───┘

Every rank calls embed, layers, logits for the same batch. Only the leader gets logits; elsewhere they are empty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine.model import Hidden, Model
from engine.model_config import ModelConfig
from engine.ranks import Ranks
from engine.shard import Shard, local_config
from engine.weight_parts import Weights
from kernels.choice import Kernels

LEADER = 0


class ParallelModel(Model):
    """`config` is the whole model's, `weights` this rank's share; `shards` are all ranks'."""

    def __init__(
        self, config: ModelConfig, weights: Weights, kernels: Kernels, ranks: Ranks, shards: Sequence[Shard]
    ) -> None:
        self._ranks, self._member, self._shards = ranks, ranks.member, shards
        self._shard = shards[ranks.member.rank]
        split = ranks.member.tensor_parallel > 1
        # Not ranks.tensor itself: the groups exist only once all ranks have joined.
        super().__init__(local_config(config, self._shard), weights, kernels, self if split else None)
        # Of the whole model, though the head is split.
        self.vocab_size, self._hidden_size = config.vocab_size, config.hidden_size
        self._dtype = self._layers[0].attn_norm.dtype
        # For the pass to come: whether only the leader knows its tokens, and who hears of other stages' layers.
        self.only_leader_knows_tokens = False
        self.on_remote_layers: Callable[[int, int], None] | None = None

    def all_reduce(self, x: torch.Tensor) -> None:
        self._ranks.tensor.all_reduce(x)

    def embed(self, token_ids: torch.Tensor) -> Hidden:
        if self._shard.is_first:
            if self.only_leader_knows_tokens and self._member.tensor_parallel > 1:
                token_ids = token_ids.clone()
                self._ranks.tensor.broadcast(token_ids)
            return super().embed(token_ids)
        both = torch.empty((2, len(token_ids), self._hidden_size), dtype=self._dtype, device=token_ids.device)
        self._ranks.pipe.receive(both, self._member.rank - self._member.tensor_parallel)
        return both[0], both[1]

    def logits(self, hidden: Hidden, tokens: torch.Tensor) -> torch.Tensor:
        """[n, vocab] float32 on the leader, [0, vocab] elsewhere. Returns on the leader when every stage is done."""
        part = None
        if self._shard.is_last:
            part = super().logits(hidden, tokens).float()
        else:
            output, residual = hidden
            assert residual is not None, "a stage has at least one layer"
            self._ranks.pipe.send(torch.stack((output, residual)), self._member.rank + self._member.tensor_parallel)
        if self._member.rank == LEADER:
            self._hear_of_layers()
            return self._gather(part, len(tokens), tokens.device)
        if part is not None and len(tokens):
            self._ranks.pipe.send(part.contiguous(), LEADER)
        return torch.empty((0, self.vocab_size), device=tokens.device)

    def announce_layers(self, first: int, end: int) -> None:
        """Tells the leader that layers [first, end) of this stage have their KV in the cache: on all its ranks, since
        no rank gets past the sum that ends a layer before each has stored the layer's KV."""
        if self._member.rank != LEADER and self._member.tensor_rank == 0:
            offset = self._shard.layers.start
            self._ranks.control.send(torch.tensor([first + offset, end + offset]), LEADER)

    def _hear_of_layers(self) -> None:
        """Passes on what `announce_layers` of the other stages says, which run one after another."""
        for stage in range(1, self._member.pipeline_parallel):
            speaker = stage * self._member.tensor_parallel
            done = self._shards[speaker].layers.start
            while done < self._shards[speaker].layers.stop:
                layers = torch.empty(2, dtype=torch.int64)
                self._ranks.control.receive(layers, speaker)
                first, done = layers.tolist()
                if self.on_remote_layers is not None:
                    self.on_remote_layers(first, done)

    def _gather(self, own: torch.Tensor | None, count: int, device: torch.device) -> torch.Tensor:
        """The parts of all ranks of the last stage, side by side."""
        logits = torch.empty((count, self.vocab_size), dtype=torch.float32, device=device)
        for rank, shard in enumerate(self._shards):
            if not shard.is_last or not count:
                continue
            part = own
            if rank != LEADER or part is None:
                part = torch.empty((count, len(shard.vocab)), dtype=torch.float32, device=device)
                self._ranks.pipe.receive(part, rank)
            logits[:, shard.vocab.start : shard.vocab.stop] = part
        return logits
