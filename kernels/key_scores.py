"""What keys or values say of entries by themselves: their norms, and how much they are like all of their head.

Letters: K kv heads, E entries, D head dim.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .backend import Backend
from .cpu_library import DTYPES, loaded_library
from .paged_rows import PagedRows

_TINY = 1e-12


def entry_norms(states: PagedRows, lengths: Tensor, backend: Backend = "reference") -> Tensor:
    """[K, E] float32: Euclidean norms of states [K, E, D]; arbitrary past lengths [K] int64."""
    if backend == "cpu" and states.pages.dtype in DTYPES:
        return _by_cpu(loaded_library().entry_norms, states, lengths)
    return torch.linalg.vector_norm(states.read(), dim=-1, dtype=torch.float32)


def mean_cosines(states: PagedRows, lengths: Tensor, backend: Backend = "reference") -> Tensor:
    """[K, E] float32: the cosine between each of states [K, E, D] and the mean direction of its head's.

    Arbitrary past lengths [K] int64.
    """
    if backend == "cpu" and states.pages.dtype in DTYPES:
        return _by_cpu(loaded_library().mean_cosines, states, lengths)
    return mean_cosines_reference(states, lengths)


def mean_cosines_reference(states: PagedRows, lengths: Tensor) -> Tensor:
    """See `mean_cosines`."""
    missing = torch.arange(states.entries, device=lengths.device) >= lengths[:, None]
    known = states.read().to(torch.float32, copy=True).masked_fill_(missing[..., None], 0)
    norms = torch.linalg.vector_norm(known, dim=-1).clamp(min=_TINY)
    mean = (1 / norms)[:, None] @ known
    mean = mean / torch.linalg.vector_norm(mean, dim=-1, keepdim=True).clamp(min=_TINY)
    return (mean @ known.mT).squeeze(1) / norms


def _by_cpu(kernel: Callable[..., None], states: PagedRows, lengths: Tensor) -> Tensor:
    lengths, output = lengths.contiguous(), torch.empty(len(lengths), states.entries)
    sizes = len(lengths), states.entries, states.pages.shape[-1]
    is_bf16 = states.pages.dtype == torch.bfloat16
    kernel(states.arguments(), lengths.data_ptr(), output.data_ptr(), *sizes, is_bf16, torch.get_num_threads())
    return output
