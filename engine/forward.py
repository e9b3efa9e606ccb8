"""A forward pass: step inputs on the device in, logits out, with a word after every layer group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from engine.batch import Row
from engine.model import Hidden, Model
from engine.step_inputs import StepInputs, StepShape, shape_of

# Called in the launching thread after layers [first, end) have been launched.
AfterGroup = Callable[[int, int], None]


class Forward:
    """Runs the model over the cache, layer group by layer group."""

    def __init__(self, model: Model, kv: torch.Tensor, layer_group: int) -> None:
        assert layer_group > 0, "a layer group holds at least one layer"
        self._model = model
        self._kv = kv
        self._layer_group = layer_group

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    @property
    def block_size(self) -> int:
        return self._kv.shape[3]

    def shape_of(self, rows: Sequence[Row]) -> StepShape:
        """The shape to pack these rows into."""
        return shape_of(rows, self.block_size)

    @property
    def groups(self) -> Iterator[range]:
        layers = self._model.config.num_layers
        for first in range(0, layers, self._layer_group):
            yield range(first, min(first + self._layer_group, layers))

    def embed(self, inputs: StepInputs) -> Hidden:
        return self._model.embed(inputs.token_ids)

    def group(self, hidden: Hidden, layers: range, inputs: StepInputs) -> Hidden:
        return self._model.layers(hidden, layers, inputs.attention, self._kv)

    def logits(self, hidden: Hidden, inputs: StepInputs) -> torch.Tensor:
        return self._model.logits(hidden, inputs.sampled)

    def run(self, inputs: StepInputs, after_group: AfterGroup) -> torch.Tensor:
        """[samples, vocab] in the model's dtype."""
        hidden = self.embed(inputs)
        for layers in self.groups:
            hidden = self.group(hidden, layers, inputs)
            after_group(layers.start, layers.stop)
        return self.logits(hidden, inputs)
