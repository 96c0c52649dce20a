"""Ranks of entries inside partitions by how far they stand out from the next one (LagKV, Liang et al. 2025).

Letters: K kv heads, N partitions of P entries each, D head dim.
"""

import math

import torch
from torch import Tensor

from .backend import Backend
from .cpu_library import DTYPES, loaded_library

_LEAST_RANGE = 1e-6
"""Of a channel; a run of one token has none at all."""
_MULTIPLE = 16
"""Of sizes and head dimensions that the C++ kernel takes: the widest vector."""


def lag_ranks(keys: Tensor, values: Tensor, size: int, backend: Backend = "reference") -> Tensor:
    """[K, N - 1, P] float32 in [0, 1): multiples of 1 / P, of all partitions but the last.

    keys, values [K, N * P, D] with P = `size`. An entry is normalised per channel by the least and greatest of the next
    partition; the softmax over its partition of the deviation over channels, of keys and values together, ranks it.
    """
    fits = not (size % _MULTIPLE or keys.shape[2] % _MULTIPLE)
    if backend == "cpu" and fits and keys.dtype == values.dtype and keys.dtype in DTYPES:
        return _lag_ranks_cpu(keys, values, size)
    return lag_ranks_reference(keys, values, size)


def lag_ranks_reference(keys: Tensor, values: Tensor, size: int) -> Tensor:
    """See `lag_ranks`."""
    spread = _spread(keys, size) + _spread(values, size)
    places = torch.arange(size, device=spread.device) / size
    order = spread.argsort(dim=-1, stable=True)
    return torch.empty_like(spread).scatter_(-1, order, places.expand_as(order))


def _spread(states: Tensor, size: int) -> Tensor:
    """[K, N - 1, P]: softmax of the deviation over channels."""
    parts = states.float().unflatten(1, (-1, size))
    low, high = parts[:, 1:].amin(2, keepdim=True), parts[:, 1:].amax(2, keepdim=True)
    slope = 1 / (high - low).clamp(min=_LEAST_RANGE)
    relative = (parts[:, :-1] - low).mul_(slope)
    # The same as std(-1), at a tenth of its time on a CPU.
    centred = relative.sub_(relative.mean(-1, keepdim=True))
    return (torch.linalg.vector_norm(centred, dim=-1) / math.sqrt(parts.shape[-1] - 1)).softmax(-1)


def _lag_ranks_cpu(keys: Tensor, values: Tensor, size: int) -> Tensor:
    heads, entries, dim = keys.shape
    keys, values = (states if states[0].is_contiguous() else states.contiguous() for states in (keys, values))
    parts = entries // size
    output = torch.empty(heads, parts - 1, size)
    loaded_library().lag_ranks(
        *(tensor.data_ptr() for tensor in (keys, values, output)),
        *(keys.stride(0), values.stride(0), heads, parts, size, dim),
        *(_LEAST_RANGE, keys.dtype == torch.bfloat16, torch.get_num_threads()),
    )
    return output
