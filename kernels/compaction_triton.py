"""Moving what a pruned head keeps into its leading pages, in Triton.

Contract: that of `kernels.compaction_reference.compact_kv`; letters as there.

In place, a head's entries move towards its front: entry j comes from keep[j] >= j. One program moves all entries of its
slice of a head (keys or values, some columns) in order, a tile at a time: it has read a tile before it writes it, and
later tiles come from behind everything written so far. Between different pages tiles are independent programs.

Roofline: reads and writes 2 * D * itemsize + 4 bytes per kept entry, and reads 8 bytes of indices; no arithmetic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks_triton import check_contiguous, check_device, check_dtype, check_pool, check_rows, check_shape

_ENTRIES = 64
_COLUMNS = 64
"""Columns of a program: at least 64 bytes a row, and several programs per head where they must not be split further."""


@triton.jit(do_not_specialize=["stride_source", "stride_target", "stride_keep"])
def _compact_kernel(
    pool: tl.tensor,
    entry_positions: tl.tensor,
    source_table: tl.tensor,
    target_table: tl.tensor,
    keep: tl.tensor,
    counts: tl.tensor,
    stride_source: tl.tensor,
    stride_target: tl.tensor,
    stride_keep: tl.tensor,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    IN_PLACE: tl.constexpr,
) -> None:
    """Some columns of the keys or the values of one head: all entries with IN_PLACE, else one tile of them."""
    SLICES: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    head = tl.program_id(0).to(tl.int64)
    half, columns = tl.program_id(1) // SLICES, (tl.program_id(1) % SLICES) * COLUMNS + tl.arange(0, COLUMNS)
    count = tl.load(counts + head)
    first, last = tl.program_id(2) * ENTRIES, tl.minimum((tl.program_id(2) + 1) * ENTRIES, count)
    if IN_PLACE:
        last = count
    for begin in range(first, last, ENTRIES):
        place = begin + tl.arange(0, ENTRIES)
        inside = place < count
        index = tl.load(keep + head * stride_keep + place, mask=inside, other=0)
        source = tl.load(source_table + head * stride_source + index // PAGE, mask=inside, other=0).to(tl.int64)
        target = tl.load(target_table + head * stride_target + place // PAGE, mask=inside, other=0).to(tl.int64)
        cells = inside[:, None] & (columns < WIDTH)[None, :]
        read = (source * 2 + half) * (PAGE * WIDTH) + (index % PAGE) * WIDTH
        write = (target * 2 + half) * (PAGE * WIDTH) + (place % PAGE) * WIDTH
        moved = tl.load(pool + read[:, None] + columns[None, :], mask=cells)
        position = tl.load(entry_positions + source * PAGE + index % PAGE, mask=inside)
        # All threads have read before any writes.
        tl.debug_barrier()
        tl.store(pool + write[:, None] + columns[None, :], moved, mask=cells)
        # One program per tile moves the positions; the others' reads go unused.
        if tl.program_id(1) == 0:
            tl.store(entry_positions + target * PAGE + place % PAGE, position, mask=inside)
        tl.debug_barrier()


def compact_kv_triton(
    pool: Tensor,
    entry_positions: Tensor,
    source_table: Tensor,
    target_table: Tensor,
    keep: Tensor,
    counts: Tensor,
    *,
    in_place: bool,
) -> None:
    """`kernels.compaction_reference.compact_kv` on a GPU; mutates pool and entry_positions.

    Raises `TypeError` or `ValueError` naming the tensor; never syncs.
    """
    check_pool(pool, entry_positions)
    heads = source_table.shape[0]
    for name, tensor in (("source_table", source_table), ("target_table", target_table), ("keep", keep)):
        check_shape(name, tensor, (heads, None))
        check_dtype(name, tensor, torch.int32)
        check_rows(name, tensor)
    check_shape("counts", counts, (heads,))
    check_dtype("counts", counts, torch.int32)
    check_contiguous("counts", counts)
    check_device(
        pool.device, entry_positions=entry_positions, source_table=source_table, target_table=target_table,
        keep=keep, counts=counts,
    )  # fmt: skip
    width, columns = pool.shape[3], min(_COLUMNS, triton.next_power_of_2(pool.shape[3]))
    tiles = 1 if in_place else triton.cdiv(keep.shape[1], _ENTRIES)
    if heads and keep.shape[1]:
        _compact_kernel[(heads, 2 * triton.cdiv(width, columns), tiles)](
            pool, entry_positions, source_table, target_table, keep, counts,
            source_table.stride(0), target_table.stride(0), keep.stride(0),
            WIDTH=width, PAGE=pool.shape[2], ENTRIES=_ENTRIES, COLUMNS=columns, IN_PLACE=in_place,
            # A deeper pipeline would read the next tile before this one is written.
            num_warps=4, num_stages=1,
        )  # fmt: skip
