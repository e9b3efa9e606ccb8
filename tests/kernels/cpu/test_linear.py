"""Packed matrix products against float64, by the accuracy rule, and bit for bit against themselves.

A row's result must not depend on the threads or on the other rows of the batch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as functional

from kernels.cpu.library import Library, load
from kernels.quantise import GROUP, quantise
from tests.kernels.checks import NAN, assert_at_most_twice_the_error, randn

if load() is None:
    pytest.skip("this machine has no C++ kernels", allow_module_level=True)

from kernels.cpu.linear import WeightFormat, pack

DENSE: list[tuple[WeightFormat, torch.dtype]] = [("float32", torch.float32), ("bfloat16", torch.bfloat16)]
INTEGER: list[WeightFormat] = ["int8", "int4"]
ALL: list[tuple[WeightFormat, torch.dtype]] = [
    *DENSE,
    *((weight_format, dtype) for weight_format in INTEGER for dtype in (torch.float32, torch.bfloat16)),
]
# (out_features, in_features): one, within and over a panel of 32 and a group of 32, odd, several ranges of K.
SHAPES = [(1, 1), (3, 2), (31, 33), (32, 32), (33, 17), (70, 123), (192, 576), (40, 5001)]


@pytest.fixture
def library() -> Iterator[Library]:
    """With three threads, which may be more than there are cores, and as many as before at the end."""
    library = load()
    assert library is not None
    before = library.threads()
    library.set_threads(3)
    yield library
    library.set_threads(before)


def strided(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows that are further apart than they are long, with NaN in between."""
    wide = torch.full((rows, columns + 5), NAN, dtype=dtype)
    wide[:, :columns] = randn(rows, columns, dtype=dtype, seed=seed)
    return wide[:, :columns]


@pytest.mark.parametrize(("weight_format", "dtype"), DENSE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_dense_products_keep_the_accuracy_rule(
    shape: tuple[int, int], weight_format: WeightFormat, dtype: torch.dtype, with_bias: bool, library: Library
) -> None:
    weight = randn(*shape, dtype=dtype, seed=1)
    bias = randn(shape[0], dtype=dtype, seed=2) if with_bias else None
    linear = pack(weight, bias, weight_format)
    assert (linear.out_features, linear.in_features) == shape
    assert linear.weight_bytes >= weight.numel() * weight.itemsize
    for tokens in (1, 2, 8, 14, 15, 33, 150):
        x = strided(tokens, shape[1], dtype)
        same = functional.linear(x, weight, bias)
        truth = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert_at_most_twice_the_error(linear(x), same, truth)


def test_more_rows_than_are_packed_at_once(library: Library) -> None:
    weight, x = randn(40, 1000, dtype=torch.float32, seed=1), randn(4500, 1000, dtype=torch.float32)
    truth = functional.linear(x.double(), weight.double())
    assert_at_most_twice_the_error(pack(weight, None, "float32")(x), functional.linear(x, weight), truth)


@pytest.mark.parametrize("weight_format", INTEGER)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1.0, 1e-7], ids=["float16_scales", "float32_scales"])
def test_integer_products_lose_nothing_but_what_rounding_x_does(
    shape: tuple[int, int], size: float, weight_format: WeightFormat, library: Library
) -> None:
    weight = randn(*shape, dtype=torch.float32, seed=1) * size
    bias = randn(shape[0], dtype=torch.float32, seed=2) * size
    quantised = quantise(weight, weight_format)
    assert quantised.is_half == (size == 1)
    dequantised = quantised.dequantise().double()
    linear = pack(weight, bias, weight_format)
    for tokens in (1, 7, 8, 33):
        x = strided(tokens, shape[1], torch.float32)
        truth = functional.linear(x.double(), dequantised, bias.double())
        # Half a step of each group's scale per value, and float32's roundings on top.
        padded = functional.pad(x, (0, -shape[1] % GROUP)).view(tokens, -1, GROUP)
        half_steps = (padded.abs().amax(-1, keepdim=True) / 254).expand_as(padded).flatten(1)[:, : shape[1]]
        float32 = torch.finfo(torch.float32).eps * functional.linear(x.abs().double(), dequantised.abs()) * 64
        allowed = functional.linear(half_steps.double(), dequantised.abs()) * (1 + 1e-5) + float32
        assert ((linear(x).double() - truth).abs() <= allowed + 1e-6 * truth.abs()).all()


@pytest.mark.parametrize("weight_format", INTEGER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integer_products_of_what_int8_holds_keep_the_accuracy_rule(
    weight_format: WeightFormat, dtype: torch.dtype, library: Library
) -> None:
    tokens, out_features, in_features = 23, 70, 100
    weight = randn(out_features, in_features, dtype=torch.float32, seed=1)
    dequantised = quantise(weight, weight_format).dequantise()
    whole = randn(tokens, in_features, dtype=torch.float32).mul(40).round().clamp(-127, 127)
    whole[:, ::GROUP] = 127  # every group's largest: the scale is a power of two, and rounding x exact
    x = (whole / 64).to(dtype)
    assert torch.equal(x.float() * 64, whole)
    truth = functional.linear(x.double(), dequantised.double())
    # The accumulators are float32 whatever x is: only the result is rounded to its dtype.
    same = functional.linear(x.float(), dequantised).to(dtype)
    assert_at_most_twice_the_error(pack(weight, None, weight_format)(x), same, truth)


@pytest.mark.parametrize(("weight_format", "dtype"), ALL)
def test_a_row_is_the_same_among_any_others_and_with_any_threads(
    weight_format: WeightFormat, dtype: torch.dtype, library: Library
) -> None:
    for out_features, in_features in ((100, 288), (33, 77), (5, 4100)):
        linear = pack(
            randn(out_features, in_features, dtype=torch.float32, seed=1),
            randn(out_features, dtype=torch.float32, seed=2),
            weight_format,
        )
        x = randn(130, in_features, dtype=dtype)
        together = linear(x)
        for threads in (1, 2, 5):
            library.set_threads(threads)
            for tokens in (*range(1, 71, 3 if threads == 1 else 9), 130):
                assert torch.equal(linear(x[:tokens]), together[:tokens]), (in_features, threads, tokens)
            assert torch.equal(linear(x[77:79]), together[77:79])


@pytest.mark.parametrize(("weight_format", "dtype"), ALL)
@pytest.mark.parametrize("wrong", [NAN, float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_row(
    wrong: float, weight_format: WeightFormat, dtype: torch.dtype, library: Library
) -> None:
    linear = pack(randn(40, 70, dtype=torch.float32, seed=1), None, weight_format)
    x = randn(20, 70, dtype=dtype)
    clean = linear(x)
    x[11, 69] = wrong
    got = linear(x)
    assert not torch.isfinite(got[11]).any()
    others = [row for row in range(20) if row != 11]
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("weight_format", INTEGER)
def test_zeros_and_tiny_numbers_are_no_special_case(weight_format: WeightFormat, library: Library) -> None:
    linear = pack(torch.zeros(33, 64), torch.full((33,), 2.0), weight_format)
    x = torch.cat([torch.zeros(1, 64), torch.full((1, 64), 1e-40), torch.ones(1, 64)])
    assert torch.equal(linear(x), torch.full((3, 33), 2.0))
    linear = pack(torch.ones(33, 64), None, weight_format)
    assert (linear(x)[:2] == 0).all()
    assert torch.allclose(linear(x)[2], torch.tensor(64.0), rtol=2**-10)


def test_no_rows_are_no_work(library: Library) -> None:
    linear = pack(torch.ones(4, 8), None, "float32")
    assert linear(torch.empty(0, 8)).shape == (0, 4)


def test_calls_from_several_threads_at_once(library: Library) -> None:
    """They take turns with the pool, and keep what they pack apart."""
    shapes = {"float32": (200, 300), "int8": (150, 700)}
    work = []
    for (weight_format, shape), seed in zip(shapes.items(), (1, 2), strict=True):
        linear = pack(randn(*shape, dtype=torch.float32, seed=seed), None, weight_format)
        x = randn(60, shape[1], dtype=torch.float32, seed=seed)
        work.append((linear, x, linear(x)))
    wrong: list[str] = []

    def repeat(index: int) -> None:
        linear, x, expected = work[index]
        for turn in range(100):
            if not torch.equal(linear(x), expected):
                wrong.append(f"linear {index}, turn {turn}")

    threads = [threading.Thread(target=repeat, args=(index,)) for index in (0, 1, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_wrong_arguments_are_bugs(library: Library) -> None:
    linear = pack(torch.ones(4, 8), None, "bfloat16")
    with pytest.raises(AssertionError, match="these weights multiply"):
        linear(torch.ones(1, 8))
    with pytest.raises(AssertionError, match="a row must be contiguous"):
        linear(torch.ones(8, 3, dtype=torch.bfloat16).T)
