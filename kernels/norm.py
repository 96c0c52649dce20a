"""RMSNorm: the contract, and the choice of an implementation.

y = T(x / sqrt(mean(x^2) + epsilon)) * weight over the last axis (Zhang and Sennrich 2019): the quotient in float32,
rounded to x's dtype T before the weight, as the library's modelling code does. Reads and writes x once. With
`add_rms_norm` x is a sum, rounded to T, which is written too: Triton adds and normalises in one pass.
"""

import torch
from torch import Tensor

from .backend import TRITON_BACKENDS, Backend
from .cpu_library import loaded_library


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, backend: Backend = "reference") -> Tensor:
    """x [T, E], weight [E] of x's dtype -> [T, E], contiguous. Mutates nothing; `ValueError` where shapes disagree."""
    if x.dim() != 2 or weight.shape != x.shape[1:]:
        raise ValueError(f"x must be [T, E] and weight [E], got {list(x.shape)} and {list(weight.shape)}")
    if backend in TRITON_BACKENDS:
        from .layers_triton import rms_norm_triton  # triton is installed beside a GPU only

        return rms_norm_triton(x if x.stride(1) == 1 else x.contiguous(), weight, epsilon)
    if backend != "cpu":
        return rms_norm_reference(x, weight, epsilon)
    rows, width = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty((rows, width), dtype=x.dtype)
    loaded_library().rms_norm(
        x.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        x.stride(0),
        rows,
        width,
        epsilon,
        x.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return y


def add_rms_norm(
    x: Tensor, addend: Tensor | None, weight: Tensor, epsilon: float, backend: Backend = "reference"
) -> tuple[Tensor, Tensor]:
    """(`rms_norm` of x + addend, x + addend), [T, E] both; without an addend the second is x itself."""
    if addend is None:
        return rms_norm(x, weight, epsilon, backend), x
    if backend in TRITON_BACKENDS:
        from .layers_triton import add_rms_norm_triton  # triton is installed beside a GPU only

        return add_rms_norm_triton(x, addend, weight, epsilon)
    total = x + addend
    return rms_norm(total, weight, epsilon, backend), total


def rms_norm_reference(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See `rms_norm`; any number of leading axes, the weight may have some of them too."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype) * weight
