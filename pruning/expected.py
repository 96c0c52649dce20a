"""The attention that queries to come will pay (Expected Attention, Devoto et al. 2025), times the value's norm.

Queries before rotation are taken as normal with the mean m and covariance C of those seen. With R the rotation
averaged over the next positions, E[exp(q.k * s)] = exp(s * Rm.k + s^2 / 2 * k.(R C R^T)k); a softmax over the entries
makes it a probability.
"""

import torch
from torch import Tensor

from ..kernels.quadratic_form import quadratic_form
from ..kernels.rotary import rotate_reference
from .policy import LayerView, Limits, Needs

HORIZON = 512
"""Positions to come over which the rotation is averaged."""


class ExpectedAttentionPolicy:
    """Needs no question; costs n * D^2 per query head."""

    needs = Needs(moments=True)

    def __init__(self) -> None:
        self._turn: tuple[int, tuple[Tensor, Tensor]] | None = None
        """For how many tokens, and the rotation averaged over the next positions: the same for all layers."""

    def scores(self, view: LayerView, limits: Limits) -> Tensor:
        """See `Policy.scores`."""
        counted = view.valid & (view.positions >= limits.sinks)
        logits = _expected_logits(view, self._average_turn(view)).masked_fill_(~counted[:, None], float("-inf"))
        norms = torch.linalg.vector_norm(view.values, dim=-1, dtype=torch.float32)
        return logits.softmax(2).mean(1) * norms

    def _average_turn(self, view: LayerView) -> tuple[Tensor, Tensor] | None:
        if view.rotation is None:
            return None
        if self._turn is None or self._turn[0] != view.num_tokens:
            positions = torch.arange(view.num_tokens, view.num_tokens + HORIZON, device=view.keys.device)
            cos, sin = view.rotation(positions)
            self._turn = view.num_tokens, (cos.mean(0, keepdim=True), sin.mean(0, keepdim=True))
        return self._turn[1]


def _expected_logits(view: LayerView, turn: tuple[Tensor, Tensor] | None) -> Tensor:
    """[K, G, E] float32; turn: cosines and sines [1, R / 2] of the rotation averaged over the next positions."""
    if view.query_mean is None or view.query_covariance is None:
        raise ValueError("the view has no moments of queries: the policy must name them in its needs")
    mean, covariance = view.query_mean, view.query_covariance
    if turn is not None:
        # R C R^T turns the rows of C, then its columns.
        mean = rotate_reference(mean[None], *turn)[0]
        for _ in range(2):
            covariance = rotate_reference(covariance.flatten(0, 1)[None], *turn).view_as(covariance).mT
    linear, square = view.scale * mean, view.scale**2 / 2 * covariance
    return quadratic_form(view.keys, linear, square, view.backend).unflatten(0, (len(view.keys), -1))
