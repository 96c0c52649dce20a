"""Ranks of entries inside partitions by how far they stand out from the next one (LagKV, Liang et al. 2025).

Letters: K kv heads, N partitions of P entries each, D head dim.
"""

import math

import torch
from torch import Tensor

from .backend import Backend
from .cpu_library import DTYPES, loaded_library
from .paged_rows import PagedRows

_LEAST_RANGE = 1e-6
"""Of a channel; a run of one token has none at all."""
_MULTIPLE = 16
"""Of sizes and head dimensions that the C++ kernel takes: the widest vector."""


def lag_ranks(
    scores: Tensor,
    keys: PagedRows,
    values: PagedRows,
    lengths: Tensor,
    *,
    first: int,
    size: int,
    backend: Backend = "reference",
) -> None:
    """Write ranks in [0, 1), multiples of 1 / P, into scores [K, E] float32, which must be in one piece.

    From entry `first` on each head is cut into partitions of P = `size` entries of keys and values [K, E, D]. An entry
    is normalised per channel by the least and greatest of the next partition; the softmax over its partition of the
    deviation over channels, of keys and values together, ranks it. The last complete partition of a head, by lengths
    [K] int64, and what follows it are left as they are.
    """
    states, fits = keys.pages, not (size % _MULTIPLE or keys.pages.shape[-1] % _MULTIPLE)
    if backend == "cpu" and fits and states.dtype == values.pages.dtype and states.dtype in DTYPES:
        lengths = lengths.contiguous()
        loaded_library().lag_ranks(
            *(keys.arguments(), values.arguments(), lengths.data_ptr(), scores.data_ptr()),
            *(first, *scores.shape, size, states.shape[-1]),
            *(_LEAST_RANGE, states.dtype == torch.bfloat16, torch.get_num_threads()),
        )
    else:
        lag_ranks_reference(scores, keys, values, lengths, first=first, size=size)


def lag_ranks_reference(
    scores: Tensor, keys: PagedRows, values: PagedRows, lengths: Tensor, *, first: int, size: int
) -> None:
    """See `lag_ranks`."""
    count = (scores.shape[1] - first) // size
    if count < 2:
        return
    span = slice(first, first + count * size)
    spread = _spread(keys.read()[:, span], size) + _spread(values.read()[:, span], size)
    places = torch.arange(size, device=spread.device) / size
    order = spread.argsort(dim=-1, stable=True)
    ranks = torch.empty_like(spread).scatter_(-1, order, places.expand_as(order))
    complete = (lengths - first) // size
    ranked = torch.arange(count - 1, device=complete.device) < complete[:, None] - 1
    scored = scores[:, first : first + (count - 1) * size].unflatten(1, (count - 1, size))
    scored.copy_(torch.where(ranked[:, :, None], ranks, scored))


def _spread(states: Tensor, size: int) -> Tensor:
    """[K, N - 1, P]: softmax of the deviation over channels."""
    parts = states.float().unflatten(1, (-1, size))
    low, high = parts[:, 1:].amin(2, keepdim=True), parts[:, 1:].amax(2, keepdim=True)
    slope = 1 / (high - low).clamp(min=_LEAST_RANGE)
    relative = (parts[:, :-1] - low).mul_(slope)
    # The same as std(-1), at a tenth of its time on a CPU.
    centred = relative.sub_(relative.mean(-1, keepdim=True))
    return (torch.linalg.vector_norm(centred, dim=-1) / math.sqrt(parts.shape[-1] - 1)).softmax(-1)
