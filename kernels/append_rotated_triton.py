"""Rotary embedding fused with the append to head pages, in Triton: one launch per layer instead of two.

Contract: that of `kernels.append_rotated.append_rotated`; letters as there. A program takes some query heads of one
row, which it rotates in place, or some key heads, which it rotates into their pages together with their values. Every
intermediate that the references round to the model's type is rounded here too: results agree but for the order of the
norm's sums.

Roofline: reads T * (H + K) * D + T * K * Dv elements, the angles (T * R) once per program, from L2 but for the first of
a row, and T * K * 12 bytes of destinations and positions; writes T * H * D + T * K * (D + Dv). Bound by bytes: two
launches would write and read the rotated keys, 2 * T * K * D elements, once more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .append_rotated import Rotation
from .checks_triton import (
    INDEX_TYPES,
    check_contiguous,
    check_device,
    check_dtype,
    check_float,
    check_pool,
    check_rows,
    check_shape,
)
from .tiles_triton import padded

_ELEMENTS = 512
"""Pairs of a program: enough bytes for its four warps, few enough that a decode step fills the device."""


@triton.jit
def _scaled(
    part: tl.tensor, scale: tl.tensor, gains: tl.tensor, columns: tl.tensor, inside: tl.tensor, kind: tl.constexpr
) -> tl.tensor:
    """A part of some heads times their scale and the norm weight of its columns, rounded as the reference does."""
    gain = tl.load(gains + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    return ((part * scale).to(kind).to(tl.float32) * gain).to(kind).to(tl.float32)


@triton.jit(do_not_specialize_on_alignment=["destinations", "positions"])
def _append_rotated_kernel(
    heads: tl.tensor,
    value: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    weight: tl.tensor | None,
    pool: tl.tensor,
    entry_positions: tl.tensor,
    destinations: tl.tensor,
    positions: tl.tensor,
    stride_row: tl.tensor,
    stride_value_row: tl.tensor,
    stride_value_head: tl.tensor,
    epsilon: tl.tensor,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    REST_PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
) -> None:
    """HEADS_TILE query heads of one row, or as many key heads: a thread holds both of a pair."""
    QUERY_TILES: tl.constexpr = (QUERY_HEADS + HEADS_TILE - 1) // HEADS_TILE
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    is_query = tile < QUERY_TILES
    number = tl.where(is_query, tile, tile - QUERY_TILES) * HEADS_TILE + tl.arange(0, HEADS_TILE)
    real = number < tl.where(is_query, QUERY_HEADS, KV_HEADS)
    head = tl.where(is_query, number, number + QUERY_HEADS)
    column, behind = tl.arange(0, HALF_PADDED), 2 * HALF + tl.arange(0, REST_PADDED)
    inside = real[:, None] & (column < HALF)[None, :]
    inside_rest = real[:, None] & (behind < WIDTH)[None, :]
    kind: tl.constexpr = heads.dtype.element_ty
    stored: tl.constexpr = pool.dtype.element_ty
    base = heads + row * stride_row + head[:, None] * WIDTH
    first = tl.load(base + column[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(base + HALF + column[None, :], mask=inside, other=0.0).to(tl.float32)
    rest = tl.load(base + behind[None, :], mask=inside_rest, other=0.0).to(tl.float32)
    if weight is not None:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1) + tl.sum(rest * rest, 1)
        scale = tl.rsqrt(squares / WIDTH + epsilon)[:, None]
        gains = weight + head[:, None] * WIDTH
        first = _scaled(first, scale, gains, column, inside, kind)
        second = _scaled(second, scale, gains + HALF, column, inside, kind)
        rest = _scaled(rest, scale, gains, behind, inside_rest, kind)
    c = tl.load(cos + row * HALF + column, mask=column < HALF, other=1.0).to(tl.float32)[None, :]
    s = tl.load(sin + row * HALF + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    turned = ((first * c).to(kind).to(tl.float32) - (second * s).to(kind).to(tl.float32)).to(kind)
    other = ((second * c).to(kind).to(tl.float32) + (first * s).to(kind).to(tl.float32)).to(kind)
    if is_query:
        tl.store(base + column[None, :], turned, mask=inside)
        tl.store(base + HALF + column[None, :], other, mask=inside)
        if weight is not None:
            tl.store(base + behind[None, :], rest.to(kind), mask=inside_rest)
    else:
        entry = tl.load(destinations + row * KV_HEADS + number, mask=real, other=0)
        # A page's values follow its keys: the key of entry e = page * B + offset is row e + page * B of the pool.
        target = pool + ((entry + entry // PAGE * PAGE) * WIDTH)[:, None]
        tl.store(target + column[None, :], turned.to(stored), mask=inside)
        tl.store(target + HALF + column[None, :], other.to(stored), mask=inside)
        tl.store(target + behind[None, :], rest.to(stored), mask=inside_rest)
        columns = tl.arange(0, VALUE_PADDED)[None, :]
        values = real[:, None] & (columns < VALUE_WIDTH)
        source = value + (row * stride_value_row + number * stride_value_head)[:, None] + columns
        tl.store(target + PAGE * WIDTH + columns, tl.load(source, mask=values).to(stored), mask=values)
        position = tl.load(positions + row).to(tl.int32)
        tl.store(entry_positions + entry, tl.zeros([HEADS_TILE], tl.int32) + position, mask=real)


def append_rotated_triton(
    rotation: Rotation, value: Tensor, pool: Tensor, entry_positions: Tensor, destinations: Tensor, positions: Tensor
) -> None:
    """`kernels.append_rotated.append_rotated` on a GPU; mutates the query heads, pool and entry_positions.

    A row's heads lie in one piece, rows may lie apart; value needs stride 1 along its last axis only. The key heads
    stay as they were. Raises `TypeError` or `ValueError` naming the tensor; never syncs.
    """
    heads = rotation.heads
    half = _check_rotation(rotation)
    check_pool(pool, entry_positions)
    (rows, count, width), (_, kv_heads) = heads.shape, _check_entries(heads, value, pool, destinations, positions)
    check_device(
        pool.device, entry_positions=entry_positions, heads=heads, cos=rotation.cos, sin=rotation.sin,
        norm_weight=rotation.norm_weight, value=value, destinations=destinations, positions=positions,
    )  # fmt: skip
    queries, columns = count - kv_heads, triton.next_power_of_2(half)
    tile = min(triton.next_power_of_2(max(queries, kv_heads)), max(1, _ELEMENTS // columns))
    if heads.numel():
        _append_rotated_kernel[(rows, triton.cdiv(queries, tile) + triton.cdiv(kv_heads, tile))](
            heads, value, rotation.cos, rotation.sin, rotation.norm_weight, pool, entry_positions, destinations,
            positions, heads.stride(0), value.stride(0), value.stride(1), rotation.epsilon,
            QUERY_HEADS=queries, KV_HEADS=kv_heads, WIDTH=width, VALUE_WIDTH=value.shape[2], HALF=half,
            PAGE=pool.shape[2], HEADS_TILE=tile, HALF_PADDED=columns,
            REST_PADDED=triton.next_power_of_2(max(1, width - 2 * half)), VALUE_PADDED=padded(value.shape[2]),
            num_warps=4,
        )  # fmt: skip


def _check_rotation(rotation: Rotation) -> int:
    """R / 2; raises for the first tensor that breaks the contract."""
    heads, cos, weight = rotation.heads, rotation.cos, rotation.norm_weight
    check_shape("heads", heads, (None, None, None))
    check_float("heads", heads)
    rows, count, width = heads.shape
    if heads.numel() and (heads.stride(2), heads.stride(1)) != (1, width):
        raise ValueError(f"each row's heads must lie in one piece, got strides {heads.stride()}")
    for name, tensor in (("cos", cos), ("sin", rotation.sin)):
        check_shape(name, tensor, (rows, cos.shape[1]))
        check_dtype(name, tensor, heads.dtype)
        check_contiguous(name, tensor)
    if not 0 < 2 * cos.shape[1] <= width:
        raise ValueError(f"cos must have between 1 and half of heads' {width} columns, got {cos.shape[1]}")
    if weight is not None:
        check_shape("norm_weight", weight, (count, width))
        check_dtype("norm_weight", weight, heads.dtype)
        check_contiguous("norm_weight", weight)
    return cos.shape[1]


def _check_entries(
    heads: Tensor, value: Tensor, pool: Tensor, destinations: Tensor, positions: Tensor
) -> tuple[int, int]:
    """(T, K); raises for the first tensor that breaks the contract."""
    rows, count, width = heads.shape
    check_shape("pool", pool, (None, 2, None, width))
    check_shape("destinations", destinations, (rows, None))
    check_dtype("destinations", destinations, torch.int64)
    check_contiguous("destinations", destinations)
    kv_heads = destinations.shape[1]
    if not 0 < kv_heads < count:
        raise ValueError(f"heads must be query heads and {kv_heads} key heads, got {count}")
    check_shape("value", value, (rows, kv_heads, None))
    check_float("value", value)
    check_rows("value", value)
    if value.shape[2] > width:
        raise ValueError(f"value must be at most as wide as pool's head dim {width}, got {value.shape[2]}")
    check_shape("positions", positions, (rows,))
    check_dtype("positions", positions, *INDEX_TYPES)
    check_contiguous("positions", positions)
    return rows, kv_heads
