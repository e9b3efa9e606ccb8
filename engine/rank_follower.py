"""What every rank but the leader does: run the batches that the leader names, and keep its share of the KV."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread

import torch

from engine.parallel_blocks import LEADER, serve_blocks
from engine.parallel_model import ParallelModel
from engine.rank_messages import STOP, batch_of
from engine.ranks import RankLost, Ranks
from engine.torch_runner import TorchRunner


class RankFollower:
    """One rank, loaded and joined. `bind`: as in TorchRunner, called in the thread that follows."""

    def __init__(
        self,
        runner: TorchRunner,
        model: ParallelModel,
        ranks: Ranks,
        *,
        device: torch.device,
        bind: Callable[[], None],
    ) -> None:
        self._runner, self._model, self._ranks = runner, model, ranks
        self._device, self._bind = device, bind

    def follow(self) -> None:
        """Runs in the calling thread until the leader says stop. Raises RankLost when the leader or another rank is
        gone, and whatever a forward pass raised: then this process must end, and the leader's with it."""
        self._settle()
        self._bind()
        blocks = Thread(target=self._serve_blocks, name="blocks", daemon=True)
        blocks.start()
        try:
            while (message := self._ranks.control.receive_message(LEADER)) != STOP:
                batch, self._model.only_leader_knows_tokens = batch_of(message)
                self._runner.logits(batch, self._model.announce_layers)
            blocks.join()
        finally:
            self._ranks.close()

    def _serve_blocks(self) -> None:
        self._settle()
        try:
            serve_blocks(self._runner, self._ranks.blocks)
        except RankLost:
            # Whoever is gone, the forward loop learns of it as well.
            pass
        finally:
            self._ranks.blocks.close()

    def _settle(self) -> None:
        """What torch keeps per thread."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
