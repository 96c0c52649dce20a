"""Scores that a layer's heads share: means over the entries of the same token, or of neighbouring tokens."""

import torch
from torch import Tensor

from .policy import LayerView


def mean_by_token(scores: Tensor, view: LayerView, size: int = 1) -> Tensor:
    """Each entry's score [K, E] becomes the mean over all heads' entries at positions with the same `p // size`.

    Heads may hold different entries. Arbitrary past a head's length.
    """
    last = view.num_tokens // size + 1
    place = (view.positions.long() // size).masked_fill(~view.valid, last)
    totals = scores.new_zeros(last + 1).index_add(0, place.flatten(), scores.flatten())
    counts = scores.new_zeros(last + 1).index_add(0, place.flatten(), torch.ones_like(scores).flatten())
    return (totals / counts.clamp(min=1))[place]
