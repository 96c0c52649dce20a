"""Linear layers: the contract, and the choice of an implementation.

Letters: T rows, E inputs, N outputs. The weight is the plain matrix [N, E] of the checkpoint, contiguous; no
implementation keeps another copy of it. Products are accumulated in float32 and rounded to the type of x after the
bias; then a residual is added and rounded again. Gated: the weight holds N gate rows, then N up rows, and the result
is silu(gate) * up, rounded after each of the four steps (Shazeer 2020).

2 * T * E * N FLOPs (twice that if gated); reads the weight once (N * E * itemsize bytes, what bounds few rows), x and
the residual, writes T * N elements.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import TRITON_BACKENDS, Backend
from .cpu_library import loaded_library


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    wide: bool = False,
    backend: Backend = "reference",
) -> Tensor:
    """x W^T (+ bias) (+ residual): x [T, E], weight [N, E], bias [N], residual [T, N] -> [T, N].

    All in x's dtype; `wide` returns float32 (of the same rounded values). Mutates nothing. Raises `ValueError` where
    shapes disagree.
    """
    _check(x, weight, bias, weight.shape[0])
    if residual is not None and residual.shape != (x.shape[0], weight.shape[0]):
        raise ValueError(f"residual must be {[x.shape[0], weight.shape[0]]}, got {list(residual.shape)}")
    if backend == "cpu" and x.dtype == weight.dtype:
        return _linear_cpu(x, weight, bias, residual, weight.shape[0], gated=False, wide=wide)
    return linear_reference(x, weight, bias, residual=residual, wide=wide)


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: Backend = "reference") -> Tensor:
    """silu(x G^T) * (x U^T): x [T, E], weight [2 N, E] with G over U, bias [2 N] -> [T, N]. As for `linear`."""
    _check(x, weight, bias, weight.shape[0])
    if backend == "cpu" and x.dtype == weight.dtype:
        return _linear_cpu(x, weight, bias, None, weight.shape[0] // 2, gated=True, wide=False)
    if backend in TRITON_BACKENDS:
        from .layers_triton import gated_activation_triton  # triton is installed beside a GPU only

        return gated_activation_triton(F.linear(x, weight, bias), "silu")
    return gated_linear_reference(x, weight, bias)


def linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None, wide: bool = False
) -> Tensor:
    """See `linear`."""
    y = F.linear(x, weight, bias)
    if residual is not None:
        y = residual + y
    return y.float() if wide else y


def gated_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `gated_linear`."""
    gate, up = F.linear(x, weight, bias).chunk(2, dim=-1)
    return F.silu(gate) * up


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int) -> None:
    if x.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must be [T, {weight.shape[1]}], got {list(x.shape)}")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias must be [{outputs}], got {list(bias.shape)}")


def _linear_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, outputs: int, *, gated: bool, wide: bool
) -> Tensor:
    """cpu_linear.cpp over the plain weights; which instructions it uses depends on the weight, never on the rows."""
    rows, inputs = x.shape
    x_stride, residual_stride, residual_pointer = x.stride(0), 0, None
    if x.stride(1) != 1:
        x, x_stride = x.contiguous(), inputs
    if residual is not None:
        residual = residual if residual.stride(1) == 1 else residual.contiguous()
        residual_stride, residual_pointer = residual.stride(0), residual.data_ptr()
    y = torch.empty((rows, outputs), dtype=torch.float32 if wide else x.dtype)
    loaded_library().linear(
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        residual_pointer,
        y.data_ptr(),
        x_stride,
        residual_stride,
        outputs,
        rows,
        inputs,
        outputs,
        x.dtype == torch.bfloat16,
        gated,
        wide,
        torch.get_num_threads(),
    )
    return y
