"""Bounds of the keys on each page, in Triton.

Contract: that of `kernels.page_bounds_reference.page_key_bounds`; letters as there. Roofline: reads N * B * D elements,
writes N * 2 * D; 2 comparisons per element.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks_triton import check_contiguous, check_device, check_dtype, check_float, check_shape

_COLUMNS = 64
"""Columns of a program."""


@triton.jit
def _bounds_kernel(
    bounds: tl.tensor,
    pool: tl.tensor,
    pages: tl.tensor,
    counts: tl.tensor,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Some columns of one page; ENTRIES >= PAGE rows."""
    page = tl.load(pages + tl.program_id(0)).to(tl.int64)
    count = tl.load(counts + tl.program_id(0))
    entry = tl.arange(0, ENTRIES)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (entry < tl.minimum(count, PAGE))[:, None] & (columns < WIDTH)[None, :]
    pointers = pool + page * (2 * PAGE * WIDTH) + entry[:, None] * WIDTH + columns[None, :]
    keys = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    least = tl.min(tl.where(inside, keys, float("inf")), axis=0)
    greatest = tl.max(tl.where(inside, keys, float("-inf")), axis=0)
    target = bounds + page * (2 * WIDTH) + columns
    tl.store(target, least.to(bounds.dtype.element_ty), mask=columns < WIDTH)
    tl.store(target + WIDTH, greatest.to(bounds.dtype.element_ty), mask=columns < WIDTH)


def page_key_bounds_triton(bounds: Tensor, pool: Tensor, pages: Tensor, counts: Tensor) -> None:
    """`kernels.page_bounds_reference.page_key_bounds` on a GPU; mutates bounds.

    Raises `TypeError` or `ValueError` naming the tensor; never syncs.
    """
    check_shape("pool", pool, (None, 2, None, None))
    check_float("pool", pool)
    check_contiguous("pool", pool)
    check_shape("bounds", bounds, (pool.shape[0], 2, pool.shape[3]))
    check_dtype("bounds", bounds, pool.dtype)
    check_contiguous("bounds", bounds)
    check_shape("pages", pages, (None,))
    check_shape("counts", counts, tuple(pages.shape))
    for name, tensor in (("pages", pages), ("counts", counts)):
        check_dtype(name, tensor, torch.int32)
        check_contiguous(name, tensor)
    check_device(pool.device, bounds=bounds, pages=pages, counts=counts)
    width, columns = pool.shape[3], min(_COLUMNS, triton.next_power_of_2(pool.shape[3]))
    if len(pages):
        _bounds_kernel[(len(pages), triton.cdiv(width, columns))](
            bounds, pool, pages, counts,
            WIDTH=width, PAGE=pool.shape[2], ENTRIES=triton.next_power_of_2(pool.shape[2]), COLUMNS=columns,
            num_warps=1,
        )  # fmt: skip
