"""A replay does what the recorded work did, on new input; what a replay could not do is refused."""

from __future__ import annotations

import threading

import pytest
import torch

from kernels.capture import NotRecordable
from kernels.cpu import ops
from kernels.cpu.library import load
from kernels.cpu.linear import pack
from kernels.cpu.recording import CallRecorder, empty
from tests.kernels.checks import randn

LIBRARY = load()
assert LIBRARY is not None


def test_a_replay_computes_anew_from_the_same_memory() -> None:
    x, weight = randn(5, 64, dtype=torch.float32), randn(64, dtype=torch.float32, seed=1)
    linears = [pack(randn(64, 64, dtype=torch.float32, seed=seed), None, "float32") for seed in range(6)]

    def work() -> tuple[torch.Tensor, torch.Tensor]:
        hidden, residual = x, x
        for linear in linears:
            hidden, residual = ops.rms_norm(linear(hidden), weight, 1e-5, residual)
        return hidden, residual

    replay, (hidden, residual) = CallRecorder(LIBRARY)(work)
    for seed in (7, 8):
        x.copy_(randn(5, 64, dtype=torch.float32, seed=seed))
        expected = work()
        replay()
        assert torch.equal(hidden, expected[0])
        assert torch.equal(residual, expected[1])


def test_memory_is_used_again_by_later_results_and_other_recordings() -> None:
    x = randn(4, 256, dtype=torch.float32)

    def work() -> torch.Tensor:
        result = x
        for _ in range(20):
            result = ops.take_rows(result, order)
        return result

    order = torch.tensor([3, 2, 1, 0])
    recorder = CallRecorder(LIBRARY)
    recordings = [recorder(work) for _ in range(3)]
    assert len(recorder._memory._arrays) == 2, "one result is written while the one before is read"
    for replay, result in recordings:
        replay()
        assert torch.equal(result, x), "an even number of reversals"


def test_views_keep_their_memory() -> None:
    """A result that is gone but for a view into it must not be written over."""
    x = randn(4, 128, dtype=torch.float32)
    order, backwards = torch.arange(4), torch.tensor([3, 2, 1, 0])

    def work() -> torch.Tensor:
        half = ops.take_rows(x, order)[:, :64]
        for _ in range(5):
            ops.take_rows(x, backwards)
        return ops.take_rows(half, order)

    replay, result = CallRecorder(LIBRARY)(work)
    assert torch.equal(result, x[:, :64])
    replay()
    assert torch.equal(result, x[:, :64])


def test_what_goes_another_way_is_refused() -> None:
    x = randn(3, 32, dtype=torch.float16)
    with pytest.raises(NotRecordable, match="rms_norm"):
        CallRecorder(LIBRARY)(lambda: ops.rms_norm(x, x[0], 1e-5))
    # And the thread records no more.
    assert empty((2,), torch.float32).untyped_storage().resizable()


def test_another_thread_is_not_recorded() -> None:
    x, order = randn(3, 32, dtype=torch.float32), torch.tensor([2, 0])
    mine = torch.zeros(2, 32)

    def work() -> torch.Tensor:
        other = threading.Thread(target=lambda: mine.copy_(ops.take_rows(x, order)))
        other.start()
        other.join()
        return ops.take_rows(x, order)

    replay, result = CallRecorder(LIBRARY)(work)
    x.zero_()
    replay()
    assert (result == 0).all()
    assert mine.any(), "the other thread's result is its own"
