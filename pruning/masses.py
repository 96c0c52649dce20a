"""Scores as masses, for what multiplies or adds them up."""

import torch
from torch import Tensor


def as_masses(scores: Tensor, valid: Tensor) -> Tensor:
    """Scores [*L, K, E] if none of a layer's `valid` [*L, K, E] is negative; else each head's as a distribution.

    That is the softmax of the scores less their mean, over their deviation: it keeps the order, and does not depend
    on the unit of the scores. 0 past a head's length. NaN counts as the least.
    """
    worst = scores.masked_fill(~valid | scores.isnan(), float("inf")).amin(-1, keepdim=True)
    known = torch.where(scores.isnan(), worst, scores)
    inside = known.masked_fill(~valid, 0)
    count = valid.sum(-1, keepdim=True).clamp(min=1)
    mean = inside.sum(-1, keepdim=True) / count
    deviation = ((inside - mean).masked_fill(~valid, 0).square().sum(-1, keepdim=True) / count).sqrt()
    standard = ((inside - mean) / deviation.clamp(min=1e-12)).masked_fill(~valid, float("-inf"))
    negative = (inside < 0).flatten(-2).any(-1)[..., None, None]
    return torch.where(negative, standard.softmax(-1), inside)
