"""Recording CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels.capture import Result


class CudaCapture:
    """Records CUDA graphs that share one memory pool: they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        # Compiles kernels and lets them choose their tile sizes, neither of which can be recorded.
        work()
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads go on exporting KV meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
        ):
            result = work()
        graph.replay()
        return graph.replay, result
