"""Means of scores: over what a layer's heads hold of the same or of neighbouring tokens; over a head's neighbours.

Letters: K kv heads, E entries, n tokens.
"""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from .backend import Backend
from .cpu_library import loaded_library
from .paged_rows import PagedRows


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


def mean_by_neighbours(
    scores: Tensor, positions: PagedRows, lengths: Tensor, newest: int, size: int, backend: Backend = "reference"
) -> Tensor:
    """[K, E] float32: means of scores [K, E] float32 over `size` (odd) neighbouring entries of a head.

    What lies at positions [K, E] from `newest` on counts as 0, and so does what lies past a head's ends; lengths [K]
    int64, past which scores must be 0.
    """
    if backend != "cpu":
        earlier = scores.masked_fill(positions.read() >= newest, 0)
        return avg_pool1d(earlier[:, None], size, stride=1, padding=size // 2).squeeze(1)
    scores, lengths, means = scores.contiguous(), lengths.contiguous(), torch.empty(scores.shape)
    loaded_library().mean_by_neighbours(
        *(scores.data_ptr(), positions.arguments(), lengths.data_ptr(), means.data_ptr()), *(*means.shape, newest, size)
    )
    return means
