"""The attention that queries to come will pay (Expected Attention, Devoto et al. 2025), times the value's norm.

Queries before rotation are taken as normal with the mean m and covariance C of those seen. With R the rotation
averaged over the next positions, E[exp(q.k * s)] = exp(s * Rm.k + s^2 / 2 * k.(R C R^T)k); a softmax over the entries
makes it a probability.
"""

import torch
from torch import Tensor

from .policy import LayerView, Limits, Needs, Rotation

HORIZON = 512
"""Positions to come over which the rotation is averaged."""


class ExpectedAttentionPolicy:
    """Needs no question; costs n * D^2 per query head."""

    needs = Needs(moments=True)

    def __init__(self) -> None:
        self._turn: tuple[int, Tensor] | None = None
        """For how many tokens, and the rotation averaged over the next positions: the same for all layers."""

    def scores(self, view: LayerView, limits: Limits) -> Tensor:
        """See `Policy.scores`."""
        counted = view.valid & (view.positions >= limits.sinks)
        logits = _expected_logits(view, self._average_turn(view)).masked_fill_(~counted[:, None], float("-inf"))
        norms = torch.linalg.vector_norm(view.values, dim=-1, dtype=torch.float32)
        return logits.softmax(2).mean(1) * norms

    def _average_turn(self, view: LayerView) -> Tensor | None:
        if view.rotation is None:
            return None
        if self._turn is None or self._turn[0] != view.num_tokens:
            device, dim = view.keys.device, view.keys.shape[2]
            self._turn = view.num_tokens, average_rotation(view.rotation, view.num_tokens, dim, device)
        return self._turn[1]


def _expected_logits(view: LayerView, turn: Tensor | None) -> Tensor:
    """[K, G, E] float32; turn [D, D]."""
    if view.query_mean is None or view.query_covariance is None:
        raise ValueError("the view has no moments of queries: the policy must name them in its needs")
    mean, covariance = view.query_mean, view.query_covariance
    keys = view.keys.float()
    kv_heads, dim = keys.shape[0], keys.shape[2]
    if turn is not None:
        mean, covariance = mean @ turn.T, turn @ covariance @ turn.T
    logits = view.scale * (mean.view(kv_heads, -1, dim) @ keys.mT)
    spread = covariance.view(kv_heads, -1, dim, dim)
    for head in range(spread.shape[1]):
        logits[:, head] += view.scale**2 / 2 * torch.linalg.vecdot(keys @ spread[:, head], keys)
    return logits


def average_rotation(rotation: Rotation, start: int, dim: int, device: torch.device) -> Tensor:
    """Mean of the rotation matrices [D, D] of positions start .. start + HORIZON - 1; what is not rotated stays."""
    cos, sin = (part.mean(0) for part in rotation(torch.arange(start, start + HORIZON, device=device)))
    half = len(cos)
    turn = torch.eye(dim, device=device)
    first = torch.arange(half, device=device)
    turn[first, first] = turn[first + half, first + half] = cos
    turn[first, first + half], turn[first + half, first] = -sin, sin
    return turn
