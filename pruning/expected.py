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

    def scores(self, view: LayerView, limits: Limits) -> Tensor:
        """See `Policy.scores`."""
        counted = view.valid & (view.positions >= limits.sinks)
        logits = _expected_logits(view).masked_fill(~counted[:, :, None], float("-inf"))
        norms = torch.linalg.vector_norm(view.values, dim=-1, dtype=torch.float32)
        return logits.softmax(1).mean(2) * norms


def _expected_logits(view: LayerView) -> Tensor:
    """[K, E, G] float32."""
    if view.query_mean is None or view.query_covariance is None:
        raise ValueError("the view has no moments of queries: the policy must name them in its needs")
    mean, covariance = view.query_mean, view.query_covariance
    keys = view.keys.float()
    kv_heads, dim = keys.shape[0], keys.shape[2]
    if view.rotation is not None:
        turn = average_rotation(view.rotation, view.num_tokens, dim, keys.device)
        mean, covariance = mean @ turn.T, turn @ covariance @ turn.T
    logits = view.scale * (keys @ mean.view(kv_heads, -1, dim).transpose(1, 2))
    spread = covariance.view(kv_heads, -1, dim, dim)
    for head in range(spread.shape[1]):
        logits[:, :, head] += view.scale**2 / 2 * ((keys @ spread[:, head]) * keys).sum(-1)
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
