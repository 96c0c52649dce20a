"""Linear layers, norms and rotation in C++ against plain torch, and what they promise about rounding and batches."""

from typing import Any

import pytest
import torch

from quire.kernels.linear import gated_linear, linear
from quire.kernels.norm import rms_norm
from quire.kernels.rotary import rotate_heads

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    # Orders of summation differ over up to 2500 products of order one.
    torch.float32: {"rtol": 1e-5, "atol": 3e-5},
    # A float32 sum that differs in the last bits may round to the neighbouring bfloat16, 2**-8 away, at each rounding.
    torch.bfloat16: {"rtol": 2**-6, "atol": 2**-7},
}


def normal(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 6, 7, 33])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 16), (64, 48), (448, 130), (37, 1), (1030, 5), (2500, 40)])
def test_linear(dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> None:
    """Sizes that fill no tile, inputs that are cut into chunks, with every addition."""
    x, weight = normal(rows, inputs, seed=1, dtype=dtype), normal(outputs, inputs, seed=2, dtype=dtype) / inputs**0.5
    bias, residual = normal(outputs, seed=3, dtype=dtype), normal(rows, outputs, seed=4, dtype=dtype)
    for extra in ({}, {"bias": bias}, {"residual": residual}, {"bias": bias, "residual": residual, "wide": True}):
        result = linear(x, weight, **extra, backend="cpu")
        torch.testing.assert_close(result, linear(x, weight, **extra), **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 21])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (448, 13), (1100, 20)])
def test_gated_linear(dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> None:
    x, weight = normal(rows, inputs, seed=1, dtype=dtype), normal(2 * outputs, inputs, seed=2, dtype=dtype)
    weight /= inputs**0.5
    for bias in (None, normal(2 * outputs, seed=3, dtype=dtype)):
        result = gated_linear(x, weight, bias, backend="cpu")
        torch.testing.assert_close(result, gated_linear(x, weight, bias), **TOLERANCE[dtype])


def test_silu_of_extreme_gates() -> None:
    gates = torch.tensor([-3e38, -200.0, -88.0, -1e-30, 0.0, 1e-30, 88.0, 200.0, 3e38, torch.nan])
    weight = gates.repeat(2)[:, None]  # gate and up alike
    result = gated_linear(torch.ones(1, 1), weight, backend="cpu")
    torch.testing.assert_close(result[0], torch.nn.functional.silu(gates) * gates, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [448, 2500])
def test_a_row_does_not_depend_on_the_batch(dtype: torch.dtype, inputs: int) -> None:
    """To the bit: greedy text is the same alone and in any batch."""
    x, weight = normal(70, inputs, seed=1, dtype=dtype), normal(96, inputs, seed=2, dtype=dtype)
    whole, gated = linear(x, weight, backend="cpu"), gated_linear(x, weight, backend="cpu")
    for first, end in ((0, 1), (5, 7), (9, 12), (20, 63), (69, 70)):
        assert torch.equal(linear(x[first:end], weight, backend="cpu"), whole[first:end])
        assert torch.equal(gated_linear(x[first:end], weight, backend="cpu"), gated[first:end])


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 16), (4896, 40), (800, 100)])
def test_many_rows(inputs: int, outputs: int) -> None:
    """So many that they are cut among threads, into blocks, and the inputs into chunks; the outputs fill no tile."""
    x = normal(290, inputs, seed=1, dtype=torch.bfloat16)
    weight = normal(2 * outputs, inputs, seed=2, dtype=torch.bfloat16) / inputs**0.5
    bias, residual = (normal(*shape, seed=3, dtype=torch.bfloat16) for shape in ((2 * outputs,), (290, 2 * outputs)))
    whole = linear(x, weight, bias, residual=residual, backend="cpu")
    torch.testing.assert_close(whole, linear(x, weight, bias, residual=residual), **TOLERANCE[torch.bfloat16])
    gated = gated_linear(x, weight, bias, backend="cpu")
    torch.testing.assert_close(gated, gated_linear(x, weight, bias), **TOLERANCE[torch.bfloat16])
    for first, end in ((0, 1), (128, 131), (150, 170), (289, 290)):
        alone = linear(x[first:end], weight, bias, residual=residual[first:end], backend="cpu")
        assert torch.equal(alone, whole[first:end])
        assert torch.equal(gated_linear(x[first:end], weight, bias, backend="cpu"), gated[first:end])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(linear(x, weight, bias, residual=residual, backend="cpu"), whole)
            assert torch.equal(gated_linear(x, weight, bias, backend="cpu"), gated)
    finally:
        torch.set_num_threads(threads)


def test_wrong_shapes_are_refused() -> None:
    weight = torch.zeros(6, 4)
    with pytest.raises(ValueError, match=r"x must be \[T, 4\], got \[2, 5\]"):
        linear(torch.zeros(2, 5), weight)
    with pytest.raises(ValueError, match=r"bias must be \[6\]"):
        linear(torch.zeros(2, 4), weight, torch.zeros(5))
    with pytest.raises(ValueError, match=r"residual must be \[2, 6\]"):
        linear(torch.zeros(2, 4), weight, residual=torch.zeros(2, 4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 448), (3, 37), (40, 1024), (2, 7)])
def test_rms_norm(dtype: torch.dtype, rows: int, width: int) -> None:
    x, weight = normal(rows, 2 * width, seed=1, dtype=dtype)[:, :width] * 3, normal(width, seed=2, dtype=dtype)
    result = rms_norm(x, weight, 1e-5, "cpu")
    torch.testing.assert_close(result, rms_norm(x, weight, 1e-5), **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("width", "rotated"), [(128, 128), (64, 64), (80, 80), (16, 8), (24, 24), (64, 32)])
def test_rotate_heads(dtype: torch.dtype, normed: bool, width: int, rotated: int) -> None:
    """In place on the leading heads of a wider buffer, whose other heads stay."""
    buffer = normal(5, 7, width, seed=1, dtype=dtype)
    expected, before = buffer.clone(), buffer.clone()
    angles = normal(5, rotated // 2, seed=2, dtype=torch.float32)
    options: dict[str, Any] = {"norm_weight": normal(4, width, seed=3, dtype=dtype), "epsilon": 1e-6} if normed else {}
    for target, backend in ((buffer, "cpu"), (expected, "reference")):
        options["backend"] = backend
        rotate_heads(target[:, :4], angles.cos().to(dtype), angles.sin().to(dtype), **options)
    torch.testing.assert_close(buffer, expected, **TOLERANCE[dtype])
    assert torch.equal(buffer[:, 4:], before[:, 4:])
    if dtype == torch.bfloat16 and not normed:
        assert torch.equal(buffer, expected), "every product is rounded as the library rounds it"


def test_rotate_refuses_scattered_heads() -> None:
    with pytest.raises(ValueError, match="one piece"):
        rotate_heads(torch.zeros(4, 3, 16).transpose(0, 1), torch.zeros(3, 8), torch.zeros(3, 8))
