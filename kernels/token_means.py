"""Scores that a layer's heads share: means over what they hold of the same token, or of neighbouring tokens.

Letters: K kv heads, E entries, n tokens.
"""

import torch
from torch import Tensor

from .backend import Backend
from .cpu_library import loaded_library


def mean_by_token(
    scores: Tensor, positions: Tensor, lengths: Tensor, num_tokens: int, size: int, backend: Backend = "reference"
) -> Tensor:
    """[K, E] float32: the mean of scores [K, E] over all heads' entries at positions with the same `p // size`.

    positions [K, E] int32, below n = `num_tokens`; lengths [K] int64, past which nothing counts and what is returned is
    arbitrary. Heads may hold different entries.
    """
    if backend != "cpu":
        return mean_by_token_reference(scores, positions, lengths, num_tokens, size)
    means = scores.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    positions, lengths = positions if positions.stride(1) == 1 else positions.contiguous(), lengths.contiguous()
    loaded_library().mean_by_token(
        *(tensor.data_ptr() for tensor in (means, positions, lengths)),
        *(*means.shape, positions.stride(0), num_tokens, size),
    )
    return means


def mean_by_token_reference(scores: Tensor, positions: Tensor, lengths: Tensor, num_tokens: int, size: int) -> Tensor:
    """See `mean_by_token`."""
    last = num_tokens // size + 1
    missing = torch.arange(scores.shape[1], device=scores.device) >= lengths[:, None]
    place = (positions.long() // size).masked_fill(missing, last)
    totals = scores.new_zeros(last + 1).index_add(0, place.flatten(), scores.flatten())
    counts = scores.new_zeros(last + 1).index_add(0, place.flatten(), torch.ones_like(scores).flatten())
    return (totals / counts.clamp(min=1))[place]
