"""Writing into the paged KV cache in Triton.

Contract: that of `kernels.cache.append_kv`; letters as there. A program stores a few (row, head) pairs: key, value and
position of each. Strided keys and values (views into a fused projection) are read as they lie.

Roofline: reads and writes T * K * (D + Dv) elements each, and T * K * 12 bytes of destinations and positions; no
arithmetic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

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

_PAIRS = 8
"""(row, head) pairs of one program: enough bytes for its four warps, few enough that a decode step fills the device."""


@triton.jit(do_not_specialize=["pairs"], do_not_specialize_on_alignment=["destinations", "positions"])
def _append_kernel(
    pool: tl.tensor,
    entry_positions: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    destinations: tl.tensor,
    positions: tl.tensor,
    pairs: tl.tensor,
    stride_key_row: tl.tensor,
    stride_key_head: tl.tensor,
    stride_value_row: tl.tensor,
    stride_value_head: tl.tensor,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    PAIRS: tl.constexpr,
    PADDED: tl.constexpr,
) -> None:
    """PAIRS (row, head) pairs of T * K = `pairs`."""
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    inside = pair < pairs
    row, head = (pair // KV_HEADS).to(tl.int64), pair % KV_HEADS
    entry = tl.load(destinations + pair, mask=inside, other=0)
    columns = tl.arange(0, PADDED)[None, :]
    # A page's values follow its keys: the key of entry e = page * B + offset is row e + page * B of the pool.
    target = pool + ((entry + entry // PAGE * PAGE) * WIDTH)[:, None] + columns
    keys = inside[:, None] & (columns < WIDTH)
    source = key + (row * stride_key_row + head * stride_key_head)[:, None] + columns
    tl.store(target, tl.load(source, mask=keys).to(pool.dtype.element_ty), mask=keys)
    values = inside[:, None] & (columns < VALUE_WIDTH)
    source = value + (row * stride_value_row + head * stride_value_head)[:, None] + columns
    tl.store(target + PAGE * WIDTH, tl.load(source, mask=values).to(pool.dtype.element_ty), mask=values)
    tl.store(entry_positions + entry, tl.load(positions + row, mask=inside).to(tl.int32), mask=inside)


def append_kv_triton(
    pool: Tensor, entry_positions: Tensor, key: Tensor, value: Tensor, destinations: Tensor, positions: Tensor
) -> None:
    """`kernels.cache.append_kv` on a GPU; mutates pool and entry_positions.

    key and value need stride 1 along their last axis only. Raises `TypeError` or `ValueError` naming the tensor;
    never syncs.
    """
    check_pool(pool, entry_positions)
    _, _, page_size, width = pool.shape
    check_shape("key", key, (None, None, width))
    tokens, kv_heads, _ = key.shape
    check_shape("value", value, (tokens, kv_heads, None))
    if value.shape[2] > width:
        raise ValueError(f"value must be at most as wide as pool's head dim {width}, got {value.shape[2]}")
    for name, tensor in (("key", key), ("value", value)):
        check_float(name, tensor)
        check_rows(name, tensor)
    check_shape("destinations", destinations, (tokens, kv_heads))
    check_dtype("destinations", destinations, torch.int64)
    check_contiguous("destinations", destinations)
    check_shape("positions", positions, (tokens,))
    check_dtype("positions", positions, *INDEX_TYPES)
    check_contiguous("positions", positions)
    check_device(
        pool.device, entry_positions=entry_positions, key=key, value=value, destinations=destinations,
        positions=positions,
    )  # fmt: skip
    pairs = tokens * kv_heads
    if pairs:
        _append_kernel[(triton.cdiv(pairs, _PAIRS),)](
            pool, entry_positions, key, value, destinations, positions, pairs,
            key.stride(0), key.stride(1), value.stride(0), value.stride(1),
            KV_HEADS=kv_heads, WIDTH=width, VALUE_WIDTH=value.shape[2], PAGE=page_size,
            PAIRS=_PAIRS, PADDED=padded(width), num_warps=4,
        )  # fmt: skip
