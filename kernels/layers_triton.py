"""The elementwise operations of a decoder layer in Triton, each in one pass over its data.

Contracts: those of `kernels.layers_reference`, `kernels.norm` and `kernels.rotary`; letters as there. Every
intermediate that the references round to the model's type is rounded here too: results agree but for the order of sums.

Roofline, elements read + written: add_rms_norm 4 * T * E (2 * T * E without residual); rotate_heads 2 * T * N * D;
gated_activation 3 * T * F. All are bound by bytes.
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
def _scaled(
    part: tl.tensor, scale: tl.tensor, gains: tl.tensor, columns: tl.tensor, inside: tl.tensor, kind: tl.constexpr
) -> tl.tensor:
    """A part of some heads times their scale and the norm weight of its columns, rounded as the reference does."""
    gain = tl.load(gains + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    return ((part * scale).to(kind).to(tl.float32) * gain).to(kind).to(tl.float32)


@triton.jit
def _rotate_kernel(
    heads: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    weight: tl.tensor | None,
    stride_row: tl.tensor,
    stride_head: tl.tensor,
    epsilon: tl.tensor,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    REST_PADDED: tl.constexpr,
) -> None:
    """HEADS_TILE heads of one row, in place: a thread holds both of a pair, so none reads what another has written."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_TILE + tl.arange(0, HEADS_TILE)
    column, behind = tl.arange(0, HALF_PADDED), 2 * HALF + tl.arange(0, REST_PADDED)
    inside = (head < HEADS)[:, None] & (column < HALF)[None, :]
    inside_rest = (head < HEADS)[:, None] & (behind < WIDTH)[None, :]
    kind: tl.constexpr = heads.dtype.element_ty
    base = heads + row * stride_row + head[:, None] * stride_head
    pointers = base + column[None, :]
    first = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(pointers + HALF, mask=inside, other=0.0).to(tl.float32)
    if weight is not None:
        rest = tl.load(base + behind[None, :], mask=inside_rest, other=0.0).to(tl.float32)
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1) + tl.sum(rest * rest, 1)
        scale = tl.rsqrt(squares / WIDTH + epsilon)[:, None]
        gains = weight + head[:, None] * WIDTH
        first = _scaled(first, scale, gains, column, inside, kind)
        second = _scaled(second, scale, gains + HALF, column, inside, kind)
        rest = _scaled(rest, scale, gains, behind, inside_rest, kind)
        tl.store(base + behind[None, :], rest.to(kind), mask=inside_rest)
    c = tl.load(cos + row * HALF + column, mask=column < HALF, other=1.0).to(tl.float32)[None, :]
    s = tl.load(sin + row * HALF + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    turned = (first * c).to(kind).to(tl.float32) - (second * s).to(kind).to(tl.float32)
    tl.store(pointers, turned.to(kind), mask=inside)
    turned = (second * c).to(kind).to(tl.float32) + (first * s).to(kind).to(tl.float32)
    tl.store(pointers + HALF, turned.to(kind), mask=inside)


def rotate_heads_triton(
    heads: Tensor, cos: Tensor, sin: Tensor, *, norm_weight: Tensor | None = None, epsilon: float = 0.0
) -> None:
    """`kernels.rotary.rotate_heads` on a GPU; mutates heads, which need stride 1 along D only.

    Raises `TypeError` or `ValueError` naming the tensor; never syncs.
    """
    check_shape("heads", heads, (None, None, None))
    check_float("heads", heads)
    check_rows("heads", heads)
    rows, count, width = heads.shape
    for name, tensor in (("cos", cos), ("sin", sin)):
        check_shape(name, tensor, (rows, None))
        check_dtype(name, tensor, heads.dtype)
        check_contiguous(name, tensor)
    check_shape("sin", sin, tuple(cos.shape))
    half = cos.shape[1]
    if not 0 < 2 * half <= width:
        raise ValueError(f"cos must have between 1 and half of heads' {width} columns, got {half}")
    if norm_weight is not None:
        check_shape("norm_weight", norm_weight, (count, width))
        check_dtype("norm_weight", norm_weight, heads.dtype)
        check_contiguous("norm_weight", norm_weight)
    check_device(heads.device, cos=cos, sin=sin, norm_weight=norm_weight)
    columns = triton.next_power_of_2(half)
    tile = min(triton.next_power_of_2(count), max(1, 512 // columns))
    if heads.numel():
        _rotate_kernel[(rows, triton.cdiv(count, tile))](
            heads, cos, sin, norm_weight, heads.stride(0), heads.stride(1), epsilon,
            HEADS=count, WIDTH=width, HALF=half, HEADS_TILE=tile, HALF_PADDED=columns,
            REST_PADDED=triton.next_power_of_2(max(1, width - 2 * half)), num_warps=4,
        )  # fmt: skip


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
