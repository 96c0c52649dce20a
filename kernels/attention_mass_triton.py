"""How much probability each cache entry gets, in Triton: a by-product of attention for pruning scores.

Contract: that of `kernels.attention_mass_reference.attention_mass`; letters as there. Attention keeps each row's
log-sum-exp (`log_sums` of `paged_attention`), so one more pass over keys and queries gives the weights themselves,
without a softmax of its own and without atomics: a program owns a tile of entries and sums over all rows.

Roofline, per kv head: bytes D * itemsize per entry, and every tile of entries reads the observed rows once (from L2);
FLOPs 2 * n * G * D per entry, half of attention's. Writes 4 bytes per entry.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tile_triton import INDICES, LOG2_E, TABLE_STRIDES, cap_scores, load_columns, locate_head
from .checks_triton import check_contiguous, check_device, check_dtype, check_pool, check_shape, check_step
from .tiles_triton import HeadShape, device_limits, padded, uses_tensor_cores

_ALL_ROWS = 2**31 - 1


@triton.jit(do_not_specialize=["max_kept", "observe", "window", *TABLE_STRIDES], do_not_specialize_on_alignment=INDICES)
def _mass_kernel(
    query: tl.tensor,
    pool: tl.tensor,
    entry_positions: tl.tensor,
    page_table: tl.tensor,
    kept: tl.tensor,
    query_start: tl.tensor,
    positions: tl.tensor,
    log_sums: tl.tensor,
    mass: tl.tensor,
    stride_query_row: tl.tensor,
    stride_query_head: tl.tensor,
    stride_table_sequence: tl.tensor,
    stride_table_head: tl.tensor,
    stride_kept_sequence: tl.tensor,
    stride_kept_head: tl.tensor,
    max_kept: tl.tensor,
    observe: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor | None,
    softcap: tl.tensor | None,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    PADDED: tl.constexpr,
) -> None:
    """ENTRIES entries of one kv head of one sequence: rows are (token, head in group) pairs, ROWS at a time."""
    kv_head, sequence = tl.program_id(1), tl.program_id(2)
    index = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    start = tl.load(query_start + sequence).to(tl.int32)
    length = tl.load(query_start + sequence + 1).to(tl.int32) - start
    table, held = locate_head(
        page_table, kept, None, sequence, kv_head, stride_table_sequence,
        stride_table_head, stride_kept_sequence, stride_kept_head,
    )  # fmt: skip
    inside = index < held + length
    pages = tl.load(table + index // PAGE, mask=inside, other=0).to(tl.int64)
    k = load_columns(
        pool + (pages * (2 * PAGE * WIDTH) + (index % PAGE) * WIDTH)[:, None], inside, True, WIDTH, PADDED
    ).to(query.dtype.element_ty)
    entry_position = tl.load(entry_positions + pages * PAGE + index % PAGE, mask=inside, other=0)
    columns = tl.arange(0, PADDED)
    total = tl.zeros([ENTRIES], tl.float32)
    # The tile's first entry, if it is new, is seen by its own row and those after it alone.
    first_token = tl.maximum(tl.maximum(length - observe, 0), tl.program_id(0) * ENTRIES - held)
    for first in range(first_token * GROUP, length * GROUP, ROWS):
        row = first + tl.arange(0, ROWS)
        token, head = row // GROUP, kv_head * GROUP + row % GROUP
        real = token < length
        rows = (start + token).to(tl.int64)
        q = tl.load(
            query + (rows * stride_query_row + head * stride_query_head)[:, None] + columns[None, :],
            mask=real[:, None] & (columns < WIDTH)[None, :], other=0.0,
        )  # fmt: skip
        scores = cap_scores(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap)
        log_sum = tl.load(log_sums + rows * HEADS + head, mask=real, other=0.0) * 1.4426950408889634
        visible = real[:, None] & inside[None, :] & (index[None, :] <= held + token[:, None])
        if window is not None:
            position = tl.load(positions + rows, mask=real, other=0).to(tl.int32)
            visible = visible & (entry_position[None, :] > position[:, None] - window)
        total += tl.sum(tl.where(visible, tl.exp2(scores - log_sum[:, None]), 0.0), axis=0)
    place = (sequence.to(tl.int64) * (HEADS // GROUP) + kv_head) * max_kept
    tl.store(mass + place + index, total, mask=index < max_kept)


def attention_mass_triton(
    query: Tensor,
    pool: Tensor,
    entry_positions: Tensor,
    page_table: Tensor,
    kept: Tensor,
    query_start: Tensor,
    query_lengths: tuple[int, ...],
    positions: Tensor,
    log_sums: Tensor,
    *,
    max_kept: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    observe: int | None = None,
) -> Tensor:
    """`kernels.attention_mass_reference.attention_mass` on a GPU: [S, K, max_kept] float32.

    Raises `TypeError` or `ValueError` naming the tensor; never syncs.
    """
    check_pool(pool, entry_positions)
    check_step(query, pool, page_table, kept, query_start, query_lengths, positions)
    _check_rows(query, entry_positions, log_sums, observe)
    (sequences, kv_heads, _), (_, heads, width) = page_table.shape, query.shape
    group = heads // kv_heads
    mass = query.new_empty(sequences, kv_heads, max_kept, dtype=torch.float32)
    rows, entries = mass_tile(max(query_lengths, default=0) * group, width, query, pool)
    if mass.numel():
        _mass_kernel[(triton.cdiv(max_kept, entries), kv_heads, sequences)](
            query, pool, entry_positions, page_table, kept, query_start, positions, log_sums, mass,
            query.stride(0), query.stride(1), page_table.stride(0), page_table.stride(1),
            kept.stride(0), kept.stride(1), max_kept, _ALL_ROWS if observe is None else observe,
            scale * LOG2_E if softcap is None else scale, window, softcap,
            GROUP=group, HEADS=heads, WIDTH=width, PAGE=pool.shape[2], ROWS=rows, ENTRIES=entries,
            PADDED=padded(width), num_warps=4, num_stages=2,
        )  # fmt: skip
    return mass


def _check_rows(query: Tensor, entry_positions: Tensor, log_sums: Tensor, observe: int | None) -> None:
    check_shape("log_sums", log_sums, tuple(query.shape[:2]))
    check_dtype("log_sums", log_sums, torch.float32)
    check_contiguous("log_sums", log_sums)
    check_device(query.device, entry_positions=entry_positions, log_sums=log_sums)
    if observe is not None and observe < 1:
        raise ValueError(f"observe must be at least 1 row, got {observe}")


def mass_tile(rows: int, width: int, query: Tensor, pool: Tensor) -> tuple[int, int]:
    """(rows, entries) of a step of a program."""
    shape = HeadShape(width, width, max(query.itemsize, pool.itemsize))
    if not uses_tensor_cores(shape, device_limits(query.device)):
        return 16, 16
    return (16 if rows <= 16 else 64), (64 if padded(width) <= 128 else 32)
