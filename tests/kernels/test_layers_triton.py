"""The Triton layer operations against their references, which round where the library's modelling code rounds."""

from typing import Any

import pytest
import torch

from quire.kernels import layers_reference as reference
from quire.kernels.norm import add_rms_norm

from .triton_interpreter import DEVICES, DTYPES, layers_triton

pytestmark = pytest.mark.parametrize("device", DEVICES)


def tolerance(dtype: torch.dtype, largest: float = 1.0) -> dict[str, Any]:
    """Steps of the type: a sum that rounds the other way moves an intermediate of up to `largest` to its neighbour."""
    step = float(torch.finfo(dtype).eps)
    return {"rtol": 2 * step, "atol": 2 * step * largest} if dtype != torch.float32 else {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 80, 576, 4096])
@pytest.mark.parametrize("with_residual", [True, False])
def test_add_rms_norm(device: str, width: int, with_residual: bool, dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 2 * width).to(dtype)[:, :width], torch.randn(width).to(dtype)
    residual = torch.randn(5, width).to(dtype) if with_residual else None
    moved = None if residual is None else residual.to(device)
    normed, total = layers_triton.add_rms_norm_triton(x.to(device), moved, weight.to(device), 1e-6)
    expected, expected_total = add_rms_norm(x, residual, weight, 1e-6)
    torch.testing.assert_close(normed.cpu(), expected, **tolerance(dtype))
    assert torch.equal(total.cpu(), expected_total)
    if residual is None:
        alone = layers_triton.rms_norm_triton(x.to(device), weight.to(device), 1e-6)
        assert torch.equal(alone, normed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [96, 1500])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_gated_activation(device: str, width: int, activation: reference.Activation, dtype: torch.dtype) -> None:
    gate_up = (torch.randn(4, 2 * width) * 3).to(dtype)
    result = layers_triton.gated_activation_triton(gate_up.to(device), activation)
    torch.testing.assert_close(result.cpu(), reference.gated_activation(gate_up, activation), **tolerance(dtype))


def test_refusals(device: str) -> None:
    x = torch.zeros(2, 8, device=device)
    with pytest.raises(ValueError, match="weight must have shape"):
        layers_triton.add_rms_norm_triton(x, None, x[0, :4], 1e-6)
    with pytest.raises(ValueError, match="even number of columns"):
        layers_triton.gated_activation_triton(x[:, :7], "silu")
