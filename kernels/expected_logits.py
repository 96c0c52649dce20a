"""What queries to come are expected to find in each entry, and the attention that comes of it: expected attention.

Letters: H query heads, K kv heads, E entries, D head dim, R dims that are rotated.
"""

import torch
from torch import Tensor

from .backend import Backend
from .cpu_library import loaded_library
from .paged_rows import PagedRows
from .rotary import rotate_reference

_MULTIPLE = 32
"""Of head dimensions that the C++ kernel takes: what a tile register multiplies at once."""
Turn = tuple[Tensor, Tensor]
"""Cosines and sines [1, R / 2] float32."""


def expected_logits(
    keys: PagedRows,
    lengths: Tensor,
    mean: Tensor,
    covariance: Tensor,
    turn: Turn | None,
    scale: float,
    backend: Backend = "reference",
) -> Tensor:
    """[H, E] float32: s Rm.k + s^2 / 2 k.(R C R^T) k of keys [K, E, D]; arbitrary past lengths [K] int64.

    mean m [H, D] and covariance C [H, D, D] float32, which must be symmetric, of queries before their rotation; R turns
    by `turn`, None: not at all. 2 * H * E * D^2 FLOPs (half of that in C++). In float32; for keys in bfloat16 the C++
    kernel rounds the quadratic form of their deviations from the head's mean to bfloat16.
    """
    width = mean.shape[1]
    if backend == "cpu" and keys.pages.dtype == torch.bfloat16 and width % _MULTIPLE == 0:
        return _expected_logits_cpu(keys, lengths, mean, covariance, turn, scale)
    return expected_logits_reference(keys, mean, covariance, turn, scale)


def expected_logits_reference(
    keys: PagedRows, mean: Tensor, covariance: Tensor, turn: Turn | None, scale: float
) -> Tensor:
    """See `expected_logits`."""
    if turn is not None:
        # R C R^T turns the rows of C, then its columns.
        mean = rotate_reference(mean[None], *turn)[0]
        for _ in range(2):
            covariance = rotate_reference(covariance.flatten(0, 1)[None], *turn).view_as(covariance).mT
    states = keys.read().float()
    kv_heads, _, width = states.shape
    linear = (scale * mean).view(kv_heads, -1, width)
    square = (scale**2 / 2 * covariance).reshape(kv_heads, -1, width, width)
    result = linear @ states.mT
    for head in range(linear.shape[1]):
        result[:, head] += torch.linalg.vecdot(states @ square[:, head], states)
    return result.flatten(0, 1)


def mean_probabilities(
    logits: Tensor, positions: PagedRows, lengths: Tensor, sinks: int, backend: Backend = "reference"
) -> Tensor:
    """[K, E] float32: the softmax of logits [H, E] float32 over a head's entries, mean over the heads of a group.

    Entries at positions [K, E] below `sinks` are left out: 0. Arbitrary past lengths [K] int64. Overwrites the logits.
    """
    if backend != "cpu":
        return mean_probabilities_reference(logits, positions, lengths, sinks)
    logits, lengths, output = logits.contiguous(), lengths.contiguous(), torch.empty(len(lengths), logits.shape[1])
    loaded_library().mean_probabilities(
        *(logits.data_ptr(), positions.arguments(), lengths.data_ptr(), output.data_ptr()),
        *(len(logits), *output.shape, sinks, torch.get_num_threads()),
    )
    return output


def mean_probabilities_reference(logits: Tensor, positions: PagedRows, lengths: Tensor, sinks: int) -> Tensor:
    """See `mean_probabilities`."""
    missing = torch.arange(logits.shape[1], device=lengths.device) >= lengths[:, None]
    ignored = missing | (positions.read() < sinks)
    grouped = logits.unflatten(0, (len(lengths), -1)).masked_fill_(ignored[:, None], float("-inf"))
    return grouped.softmax(2).mean(1).masked_fill_(ignored, 0)


def _expected_logits_cpu(
    keys: PagedRows, lengths: Tensor, mean: Tensor, covariance: Tensor, turn: Turn | None, scale: float
) -> Tensor:
    (heads, width), half = mean.shape, 0 if turn is None else turn[0].shape[1]
    angles: tuple[Tensor | None, ...] = (None, None) if turn is None else tuple(part.contiguous() for part in turn)
    tensors: tuple[Tensor | None, ...] = lengths.contiguous(), mean.contiguous(), covariance.contiguous(), *angles
    output = torch.empty(heads, keys.entries)
    loaded_library().expected_logits(
        keys.arguments(),
        *(None if tensor is None else tensor.data_ptr() for tensor in (*tensors, output)),
        *(half, heads, len(keys.table), keys.entries, width, scale, torch.get_num_threads()),
    )
    return output
