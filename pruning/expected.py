"""The attention that queries to come will pay (Expected Attention, Devoto et al. 2025), times the value's norm.

Queries before rotation are taken as normal with the mean m and covariance C of those seen. With R the rotation
averaged over the next positions, E[exp(q.k * s)] = exp(s * Rm.k + s^2 / 2 * k.(R C R^T)k); a softmax over the entries
makes it a probability.
"""

import torch
from torch import Tensor

from ..kernels.expected_logits import expected_logits, mean_probabilities
from ..kernels.key_scores import entry_norms
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
        if view.query_mean is None or view.query_covariance is None:
            raise ValueError("the view has no moments of queries: the policy must name them in its needs")
        moments, turn = (view.query_mean, view.query_covariance), self._average_turn(view)
        logits = expected_logits(view.stored_keys, view.lengths, *moments, turn, view.scale, view.backend)
        shares = mean_probabilities(logits, view.stored_positions, view.lengths, limits.sinks, view.backend)
        return shares.mul_(entry_norms(view.stored_values, view.lengths, view.backend))

    def _average_turn(self, view: LayerView) -> tuple[Tensor, Tensor] | None:
        if view.rotation is None:
            return None
        if self._turn is None or self._turn[0] != view.num_tokens:
            positions = torch.arange(view.num_tokens, view.num_tokens + HORIZON, device=view.lengths.device)
            cos, sin = view.rotation(positions)
            self._turn = view.num_tokens, (cos.mean(0, keepdim=True), sin.mean(0, keepdim=True))
        return self._turn[1]
