"""Sums of queries and of their outer products, for the moments of queries that expected attention needs.

Letters: n rows, H query heads, D head dim, R dims that are rotated.
"""

import torch
from torch import Tensor

from .backend import Backend
from .cpu_library import loaded_library
from .rotary import rotate_reference

_MULTIPLE = 32
"""Of head dimensions that the C++ kernel takes."""


def add_moments(
    query: Tensor, cos: Tensor, sin: Tensor, total: Tensor, outer: Tensor, backend: Backend = "reference"
) -> None:
    """Add the rows of query [n, H, D], turned by cos and sin [n, R / 2] float32, to total [H, D].

    outer [H, D, D] takes the products of each row with itself; it and total are float32 in one piece, mutated. At least
    n * H * D^2 FLOPs. For queries in bfloat16 the C++ kernel rounds what was turned to bfloat16 before it multiplies;
    sums are float32.
    """
    if backend == "cpu" and query.dtype == torch.bfloat16 and query.shape[2] % _MULTIPLE == 0:
        rows, heads, width = query.shape
        query = query if query[0].is_contiguous() else query.contiguous()
        cos, sin = cos.contiguous(), sin.contiguous()
        loaded_library().add_moments(
            *(tensor.data_ptr() for tensor in (query, cos, sin, total, outer)),
            *(query.stride(0), rows, heads, width, cos.shape[1], torch.get_num_threads()),
        )
    else:
        add_moments_reference(query, cos, sin, total, outer)


def moments_of(total: Tensor, outer: Tensor, count: int, backend: Backend = "reference") -> tuple[Tensor, Tensor]:
    """Mean [H, D] and covariance [H, D, D] of the `count` rows that `add_moments` added to total and outer."""
    if backend != "cpu":
        mean = total / count
        return mean, torch.baddbmm(outer, mean[:, :, None], mean[:, None, :], beta=1 / count, alpha=-1)
    mean, covariance = torch.empty_like(total), torch.empty_like(outer)
    pointers = (tensor.data_ptr() for tensor in (total, outer, mean, covariance))
    loaded_library().moments_of(*pointers, *total.shape, count, torch.get_num_threads())
    return mean, covariance


def add_moments_reference(query: Tensor, cos: Tensor, sin: Tensor, total: Tensor, outer: Tensor) -> None:
    """See `add_moments`."""
    turned = rotate_reference(query.float(), cos, sin).transpose(0, 1)
    total += turned.sum(1)
    outer += turned.mT @ turned
