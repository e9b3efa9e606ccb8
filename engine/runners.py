"""Which runner executes a model: on a GPU the one that launches ahead and replays graphs, elsewhere the plain one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine.batch import KVLayout
from engine.device_runner import DeviceRunner
from engine.forward import Forward
from engine.forward_graphs import GraphedForward, padded_rows
from engine.kv_cache import KVCache
from engine.model import Model
from engine.model_config import ModelConfig
from engine.sampler import Sampler
from engine.structure import Guide
from engine.torch_runner import TorchRunner
from engine.weight_parts import Weights
from kernels.choice import Kernels


def make_runner(
    config: ModelConfig,
    weights: Weights,
    kernels: Kernels,
    layout: KVLayout,
    device: torch.device,
    *,
    layer_group: int,
    bind: Callable[[], None] | None = None,
    graph_rows: int = 0,
    graph_chunks: Sequence[int] = (),
    guide: Guide | None = None,
) -> TorchRunner | DeviceRunner:
    """Takes the tensors out of `weights`, and allocates the cache.

    `graph_rows`: the largest decode batch that is replayed from a recording; `graph_chunks`: the prompt chunks that a
    GPU replays. `guide` holds answers to structures.
    """
    model, cache = Model(config, weights, kernels), KVCache(layout, device, kernels.ops)
    capture = kernels.capture() if kernels.capture is not None and graph_rows else None
    if device.type == "cuda" and kernels.name == "triton":
        # Imported here: where no GPU is, Triton need not be installed.
        from engine.device_sampler import DeviceSampler

        plain = Forward(model, cache.tensor, layer_group)
        forward: Forward | GraphedForward = plain
        if capture is not None:
            forward = GraphedForward(plain, capture, padded_rows(graph_rows), graph_chunks)
        device_sampler = DeviceSampler(config.vocab_size, config.eos_token_ids, device, guide)
        return DeviceRunner(forward, cache, device_sampler, device=device)
    return TorchRunner(
        model,
        cache,
        Sampler(config.vocab_size, config.eos_token_ids, guide),
        device=device,
        layer_group=layer_group,
        bind=bind,
        capture=capture,
        recorded_rows=graph_rows,
    )
