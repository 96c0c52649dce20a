"""Scores that a layer's heads share: means over the entries of the same token, or of neighbouring tokens."""

from torch import Tensor

from ..kernels import token_means
from .policy import LayerView


def mean_by_token(scores: Tensor, view: LayerView, size: int = 1) -> Tensor:
    """Each entry's score [K, E] becomes the mean over all heads' entries at positions with the same `p // size`.

    Heads may hold different entries. Arbitrary past a head's length.
    """
    return token_means.mean_by_token(scores, view.positions, view.lengths, view.num_tokens, size, view.backend)
