"""Rotation fused with the append in Triton against its two references; it rounds where they round."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.kernels.append_rotated import Rotation, append_rotated

from .test_layers_triton import tolerance
from .triton_interpreter import DEVICES, DTYPES, append_rotated_triton

pytestmark = pytest.mark.parametrize("device", DEVICES)


def make_step(
    width: int, rotated: int, value_dim: int, normed: bool, dtype: torch.dtype, kv_heads: int = 3, pages: int = 20
) -> list[Any]:
    """Six rows of a fused projection of 7 query heads, and where their entries go; pages of 4."""
    fused = torch.randn(6, 7 + 2 * kv_heads, width).to(dtype)
    angles = torch.rand(6, rotated // 2) * 100
    weight = torch.randn(7 + kv_heads, width).to(dtype) if normed else None
    rotation = Rotation(fused[:, : 7 + kv_heads], angles.cos().to(dtype), angles.sin().to(dtype), weight, 1e-6)
    pool = torch.full((pages, 2, 4, width), 7.0).to(dtype)
    held = torch.full((pages, 4), -7, dtype=torch.int32)
    places = torch.randperm(pages * 4)[: 6 * kv_heads].view(6, kv_heads)
    return [rotation, fused[:, 7 + kv_heads :, :value_dim], pool, held, places, torch.arange(6)]


def on(device: str, step: list[Any]) -> list[Any]:
    """The step with all its tensors there; the heads still parts of longer rows."""
    fields: dict[str, Any] = {
        name: x.to(device) if isinstance(x, Tensor) else x for name, x in vars_of(step[0]).items()
    }
    longer = torch.cat([fields["heads"], fields["heads"]], 1)[:, : step[0].heads.shape[1]]
    return [Rotation(**fields | {"heads": longer}), *(x.to(device, copy=True) for x in step[1:])]


def vars_of(rotation: Rotation) -> dict[str, Any]:
    return {name: getattr(rotation, name) for name in ("heads", "cos", "sin", "norm_weight", "epsilon")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "rotated", "value_dim"), [(64, 64, 64), (80, 32, 80), (128, 128, 128), (96, 96, 40)])
@pytest.mark.parametrize("normed", [True, False])
def test_it_is_the_two_references(
    device: str, width: int, rotated: int, value_dim: int, normed: bool, dtype: torch.dtype
) -> None:
    step = make_step(width, rotated, value_dim, normed, dtype)
    there = on(device, step)
    before = there[0].heads.clone()
    append_rotated_triton.append_rotated_triton(*there)
    append_rotated(*step)
    close = tolerance(dtype, largest=8.0)
    torch.testing.assert_close(there[0].heads[:, :7].cpu(), step[0].heads[:, :7], **close)
    assert torch.equal(there[0].heads[:, 7:], before[:, 7:]), "keys go to the pages alone"
    torch.testing.assert_close(there[2].cpu(), step[2], **close)
    assert torch.equal(there[2][:, 1].cpu(), step[2][:, 1]), "values are only copied"
    assert torch.equal(there[3].cpu(), step[3])


def test_a_pool_of_another_type(device: str) -> None:
    step = make_step(16, 8, 16, True, torch.float32)
    step[2] = step[2].half()
    there = on(device, step)
    append_rotated_triton.append_rotated_triton(*there)
    append_rotated(*step)
    torch.testing.assert_close(there[2].cpu(), step[2], **tolerance(torch.float16, largest=8.0))


@pytest.mark.parametrize("kv_heads", [1, 8])
def test_other_numbers_of_key_heads(device: str, kv_heads: int) -> None:
    step = make_step(256, 256, 256, True, torch.float32, kv_heads)
    there = on(device, step)
    append_rotated_triton.append_rotated_triton(*there)
    append_rotated(*step)
    torch.testing.assert_close(there[2].cpu(), step[2], **tolerance(torch.float32, largest=8.0))
    assert torch.equal(there[3].cpu(), step[3])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: [replace(s[0], cos=s[0].cos[:, :2].contiguous()), *s[1:]], ValueError, "sin must have shape"),
        (lambda s: [replace(s[0], heads=s[0].heads[..., :8]), *s[1:]], ValueError, "must lie in one piece"),
        (lambda s: [replace(s[0], norm_weight=s[0].cos), *s[1:]], ValueError, "norm_weight must have shape"),
        (lambda s: [s[0], s[1][:, :2], *s[2:]], ValueError, "value must have shape"),
        (lambda s: [*s[:2], s[2].int(), *s[3:]], TypeError, "pool must be floating point"),
        (lambda s: [*s[:4], s[4].int(), s[5]], TypeError, "destinations must be int64"),
        (lambda s: [*s[:4], s[4].repeat(1, 4), s[5]], ValueError, "heads must be query heads and 12 key heads"),
        (lambda s: [*s[:5], s[5][:2]], ValueError, "positions must have shape"),
    ],
)
def test_refusals(device: str, change: Callable[[list[Any]], list[Any]], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        append_rotated_triton.append_rotated_triton(*change(on(device, make_step(16, 16, 16, False, torch.float32))))
