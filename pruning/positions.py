"""Keys at other positions than their own, for what needs contiguous or bounded distances.

Keys are cached rotated at the position that they had in the text. StreamingLLM (Xiao et al. 2023) counts positions by
cache slot instead, LM-Infinite (Han et al. 2023) bounds the distance; both keep a stream inside what the model was
trained on. Rotations add up, R(a) R(b) = R(a + b), so a cached key is turned by the difference. Angles are float32.
"""

import torch
from torch import Tensor

from .policy import Rotation


def rerotate(keys: Tensor, shift: Tensor, rotation: Rotation) -> Tensor:
    """Keys [..., D], each turned by `shift` [...] positions (integers, negative: back); in the keys' type.

    The half-split layout; entries behind the rotated part of a head stay. A scale that the model's cosines and sines
    carry (YaRN) is in the keys already and not applied again.
    """
    cos, sin = rotation(shift.abs().flatten().long())
    scale = torch.hypot(cos, sin)
    cos, sin = (part.view(*shift.shape, -1) for part in (cos / scale, sin / scale))
    sin = sin * shift.sign()[..., None]
    half = cos.shape[-1]
    first, second, rest = keys.float().split([half, half, keys.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(keys.dtype)


def contiguous(keys: Tensor, positions: Tensor, rotation: Rotation) -> Tensor:
    """Keys [K, E, D] held at `positions` [K, E], turned to positions 0, 1, ... E - 1 (StreamingLLM)."""
    slots = torch.arange(positions.shape[1], device=positions.device)
    return rerotate(keys, slots - positions, rotation)


def bounded(keys: Tensor, positions: Tensor, query_position: int, ceiling: int, rotation: Rotation) -> Tensor:
    """Keys [K, E, D], those further than `ceiling` behind the query turned to that distance (LM-Infinite)."""
    return rerotate(keys, (query_position - ceiling - positions).clamp(min=0), rotation)
