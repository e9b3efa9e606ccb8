"""KV blocks between a GPU and host memory, on a stream of their own: the compute stream never waits for an export.

    compute stream   layer group 0 │ layer group 1 │ layer group 2 …
    side stream                      gather 0 → pinned host memory │ gather 1 → …

Callers come from any thread. The compute stream's writes are over before a block is named here (the runner announces a
layer group only then), and an import is over when the call returns, so no stream has to wait for the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class KVStaging:
    """Runs the copies of one device. Pinned buffers come from torch's cache of them and go back to it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # High priority: a gather of some megabytes must not queue behind a whole forward pass.
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    def to_host(self, gather: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Runs `gather` on the side stream; returns its result, as bytes, in pinned memory. Waits for both."""
        with torch.cuda.stream(self._stream):
            blocks = gather().flatten().view(torch.uint8)
            host = torch.empty(blocks.shape, dtype=torch.uint8, pin_memory=True)
            host.copy_(blocks, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        # The event alone, not the stream: another thread's copies may be queued behind.
        done.synchronize()
        return host

    def to_device(self, host: torch.Tensor, scatter: Callable[[torch.Tensor], None]) -> None:
        """Copies pinned bytes to the device and runs `scatter` on them, on the side stream. Waits for both."""
        with torch.cuda.stream(self._stream):
            scatter(host.to(self._device, non_blocking=True))
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        done.synchronize()
