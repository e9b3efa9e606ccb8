"""bench/kernels.py: peers compute what ours compute, at sizes for Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench.ceilings import Ceilings
from bench.kernel_case import Case, Sizes, smoke_sizes
from engine.sampling import SamplingParams
from tests.kernels.gpu.quick_interpreter import quick_interpreter

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with quick_interpreter():
        yield


@pytest.fixture
def sizes() -> Sizes:
    return smoke_sizes(CPU)


def outputs(case: Case, *peers: str) -> list[torch.Tensor]:
    """Ours first; of what comes with a log-sum-exp, the output."""
    results = [case.ours(), *(case.peers[name]() for name in peers)]
    tensors = [result[0] if isinstance(result, tuple) else result for result in results]
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors)
    return tensors


def test_decode(sizes: Sizes) -> None:
    from bench.attention_cases import decode_case

    torch.manual_seed(0)
    case = decode_case(sizes, 3, 37)
    ours, plain, packed = outputs(case, "SDPA flash", "SDPA flash, heads packed")
    torch.testing.assert_close(ours, plain.view(ours.shape))
    torch.testing.assert_close(ours, packed.reshape(ours.shape))
    assert case.moved == 2 * 3 * 37 * 2 * 16 * 4
    assert case.flops == 4 * 3 * 37 * 4 * 16


def test_prefill(sizes: Sizes) -> None:
    from bench.attention_cases import prefill_case

    torch.manual_seed(0)
    case = prefill_case(sizes, 2, 37, 37)
    ours, plain, outer = outputs(case, "SDPA flash", "KV-outer order")
    torch.testing.assert_close(ours.view(2, 37, 4, 16).transpose(1, 2), plain)
    torch.testing.assert_close(outer, plain)
    assert case.flops == 4 * 2 * (37 * 38 // 2) * 4 * 16
    assert prefill_case(sizes, 1, 4, 10).flops == 4 * (7 + 8 + 9 + 10) * 4 * 16


def test_copies_and_small_operations(sizes: Sizes) -> None:
    from bench.kernel_cases import copy_cases, small_cases

    torch.manual_seed(0)
    for case in (*copy_cases(sizes, 32), *small_cases(sizes, 5)):
        if not case.name.startswith("scatter"):
            torch.testing.assert_close(*outputs(case, "torch"))


def test_torchs_ways_to_draw() -> None:
    """Both draw from the same distribution: of the two tokens that top-p leaves, in their proportion."""
    from bench.sampling_cases import draw_by_sort, draw_by_topk

    torch.manual_seed(0)
    params = SamplingParams(temperature=0.5, top_k=3, top_p=0.9)
    # At temperature 0.5: 8, 4, 1 and 1 of 14 parts; top-k leaves three, and two of these reach 0.9.
    logits = torch.tensor([1.0, 8.0, 4.0, 1.0]).log().mul(0.5).expand(4000, 4)
    for draw in (draw_by_sort, draw_by_topk):
        drawn = torch.bincount(draw(logits, params), minlength=4) / 4000
        assert drawn[0] == drawn[3] == 0
        assert abs(float(drawn[1]) - 2 / 3) < 0.03
    assert draw_by_topk(logits, SamplingParams(temperature=0.0)).tolist() == [1] * 4000


def test_what_cannot_run_is_said_and_the_rest_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    from bench.kernels import line, measure

    def fails() -> None:
        raise RuntimeError("no such thing\nand more")

    case = Case("a case", lambda: None, moved=8, flops=16, peers={"works": lambda: None, "fails": fails})
    cells = line(measure(case, CPU, rounds=3), Ceilings(1.0, 1.0, 1.0))
    assert cells[0] == "a case"
    assert cells[6].startswith("works ")
    assert cells[8] == "fails –"
    assert capsys.readouterr().err == "a case, fails does not run: no such thing\n"
    failed = line(measure(Case("a case", fails, moved=8), CPU, rounds=3), Ceilings(1.0, 1.0, 1.0))
    assert failed == ["a case", "failed", "", "", "", "", "", "", ""]
