"""The elementwise operations of a decoder layer in Triton, each in one pass over its data.

Contracts: those of `kernels.layers_reference` and `kernels.norm`; letters as there. Every intermediate that the
references round to the model's type is rounded here too: results agree but for the order of sums.

Roofline, elements read + written: add_rms_norm 4 * T * E (2 * T * E without residual); gated_activation 3 * T * F. Both
are bound by bytes. Rotation is fused with the cache's append, see `kernels.append_rotated_triton`.
"""

import triton
import triton.language as tl
from torch import Tensor

from .checks_triton import check_contiguous, check_device, check_dtype, check_float, check_rows, check_shape
from .layers_reference import ACTIVATIONS, Activation


@triton.jit
def _add_rms_norm_kernel(
    x: tl.tensor,
    residual: tl.tensor | None,
    weight: tl.tensor,
    normed: tl.tensor,
    total: tl.tensor | None,
    stride_x: tl.tensor,
    stride_residual: tl.tensor,
    epsilon: tl.tensor,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
) -> None:
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, PADDED)
    inside = columns < WIDTH
    kind = x.dtype.element_ty
    wide = tl.load(x + row * stride_x + columns, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        wide += tl.load(residual + row * stride_residual + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + row * WIDTH + columns, wide.to(kind), mask=inside)
        wide = wide.to(kind).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / WIDTH + epsilon)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * WIDTH + columns, ((wide * scale).to(kind).to(tl.float32) * gain).to(kind), mask=inside)


def add_rms_norm_triton(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """`kernels.norm.add_rms_norm` on a GPU; x and residual need stride 1 along E only.

    Raises `TypeError` or `ValueError` naming the tensor; never syncs.
    """
    check_shape("x", x, (None, None))
    check_float("x", x)
    check_rows("x", x)
    rows, width = x.shape
    check_shape("weight", weight, (width,))
    check_dtype("weight", weight, x.dtype)
    check_contiguous("weight", weight)
    if residual is not None:
        check_shape("residual", residual, (rows, width))
        check_dtype("residual", residual, x.dtype)
        check_rows("residual", residual)
    check_device(x.device, residual=residual, weight=weight)
    normed = x.new_empty(rows, width)
    total = None if residual is None else x.new_empty(rows, width)
    columns = triton.next_power_of_2(width)
    if rows:
        _add_rms_norm_kernel[(rows,)](
            x, residual, weight, normed, total, x.stride(0), 0 if residual is None else residual.stride(0), epsilon,
            WIDTH=width, PADDED=columns, num_warps=max(1, min(16, columns // 512)),
        )  # fmt: skip
    return normed, x if total is None else total


def rms_norm_triton(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`kernels.norm.rms_norm` on a GPU: [T, E]; x needs stride 1 along E only."""
    return add_rms_norm_triton(x, None, weight, epsilon)[0]


@triton.jit
def _gated_kernel(
    gate_up: tl.tensor,
    gated: tl.tensor,
    stride_row: tl.tensor,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """BLOCK of the F = WIDTH columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    kind = gate_up.dtype.element_ty
    x = tl.load(gate_up + row * stride_row + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride_row + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(y)) = 1 / (1 + exp(-2 y)), y = sqrt(2 / pi) * (x + 0.044715 x^3)
        x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        x = tl.maximum(x, 0.0)
    tl.store(gated + row * WIDTH + column, (x.to(kind).to(tl.float32) * up).to(kind), mask=inside)


def gated_activation_triton(gate_up: Tensor, activation: Activation) -> Tensor:
    """`kernels.layers_reference.gated_activation` on a GPU: [T, F].

    Raises `TypeError` or `ValueError` naming what is wrong; never syncs.
    """
    check_shape("gate_up", gate_up, (None, None))
    check_float("gate_up", gate_up)
    check_rows("gate_up", gate_up)
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up must have an even number of columns, got {gate_up.shape[1]}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    gated = gate_up.new_empty(rows, width)
    block = min(1024, triton.next_power_of_2(width))
    if gated.numel():
        _gated_kernel[(rows, triton.cdiv(width, block))](
            gate_up, gated, gate_up.stride(0), WIDTH=width, ACTIVATION=activation, BLOCK=block, num_warps=4
        )
    return gated
