"""Turning cached keys to other positions."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quire.models.rope import RotaryEmbedding, rope_settings
from quire.pruning.policy import Rotation
from quire.pruning.positions import bounded, contiguous, rerotate

DIM = 16
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"rope_theta": 10000.0},
    "partial": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 4096},
}


def rotation_of(kind: str) -> Rotation:
    rotary = RotaryEmbedding(rope_settings(CONFIGS[kind], DIM), torch.device("cpu"))
    return lambda positions: rotary(positions, torch.full_like(positions, 4096), torch.float32)


def rotate(keys: Tensor, positions: Tensor, rotation: Rotation) -> Tensor:
    """Keys [K, E, D] as the model stores them."""
    cos, sin = (part.view(*positions.shape, -1) for part in rotation(positions.flatten()))
    half = cos.shape[-1]
    first, second, rest = keys.split([half, half, DIM - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


@pytest.mark.parametrize("kind", CONFIGS)
def test_turned_keys_are_those_of_the_other_position(kind: str) -> None:
    rotation = rotation_of(kind)
    keys, old, new = torch.randn(2, 9, DIM), torch.randint(0, 3000, (2, 9)), torch.randint(0, 3000, (2, 9))
    turned = rerotate(rotate(keys, old, rotation), new - old, rotation)
    torch.testing.assert_close(turned, rotate(keys, new, rotation), atol=2e-3, rtol=2e-3)


def test_contiguous_positions() -> None:
    rotation = rotation_of("plain")
    keys, held = torch.randn(1, 4, DIM), torch.tensor([[0, 1, 700, 701]])
    turned = contiguous(rotate(keys, held, rotation), held, rotation)
    torch.testing.assert_close(turned, rotate(keys, torch.arange(4)[None], rotation), atol=2e-3, rtol=2e-3)


def test_distances_stop_at_the_ceiling() -> None:
    rotation = rotation_of("plain")
    keys, held, query = torch.randn(1, 4, DIM), torch.tensor([[0, 500, 904, 1000]]), 1000
    turned = bounded(rotate(keys, held, rotation), held, query, 100, rotation)
    expected = rotate(keys, torch.tensor([[900, 900, 904, 1000]]), rotation)
    torch.testing.assert_close(turned, expected, atol=2e-3, rtol=2e-3)
    assert torch.equal(turned[0, 2:], rotate(keys, held, rotation)[0, 2:])


def test_type_is_kept() -> None:
    keys = torch.randn(1, 3, DIM, dtype=torch.bfloat16)
    assert rerotate(keys, torch.tensor([[0, 1, -2]]), rotation_of("plain")).dtype == torch.bfloat16
