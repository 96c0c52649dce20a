"""k.(C k + b) of every key and query head: the heavy part of expected attention.

Letters: H query heads, K kv heads, E entries, D head dim.
"""

import torch
from torch import Tensor

from .backend import Backend
from .cpu_library import loaded_library

_MULTIPLE = 32
"""Of head dimensions that the C++ kernel takes: what a tile register multiplies at once."""


def quadratic_form(keys: Tensor, linear: Tensor, square: Tensor, backend: Backend = "reference") -> Tensor:
    """[H, E] float32 of keys [K, E, D], linear [H, D] and square [H, D, D] float32, which must be symmetric.

    2 * H * E * D^2 FLOPs. In float32; for keys in bfloat16 the C++ kernel rounds `square` to 16 significant bits.
    """
    if backend == "cpu" and keys.dtype == torch.bfloat16 and keys.shape[2] % _MULTIPLE == 0:
        return _quadratic_form_cpu(keys, linear.contiguous(), square.contiguous())
    return quadratic_form_reference(keys, linear, square)


def quadratic_form_reference(keys: Tensor, linear: Tensor, square: Tensor) -> Tensor:
    """See `quadratic_form`."""
    kv_heads, _, dim = keys.shape
    keys = keys.float()
    linear, square = linear.view(kv_heads, -1, dim), square.view(kv_heads, -1, dim, dim)
    result = linear @ keys.mT
    for head in range(linear.shape[1]):
        result[:, head] += torch.linalg.vecdot(keys @ square[:, head], keys)
    return result.flatten(0, 1)


def _quadratic_form_cpu(keys: Tensor, linear: Tensor, square: Tensor) -> Tensor:
    kv_heads, entries, dim = keys.shape
    keys = keys if keys[0].is_contiguous() else keys.contiguous()
    output = torch.empty(len(linear), entries)
    loaded_library().quadratic_form(
        *(tensor.data_ptr() for tensor in (keys, linear, square, output)),
        *(keys.stride(0), len(linear), kv_heads, entries, dim, torch.get_num_threads()),
    )
    return output
