"""Attention over the paged KV cache in Triton: one kernel for prompt chunks, verification and decoding.

Contract: that of `kernels.attention.paged_attention`, whose arguments it takes; letters as there. Two facts of the
cache are relied on: a head's new entries lie behind its kept ones in the order of their rows, and every kept entry
precedes every new one in position. So causality is a matter of indices, less what a row's mask takes away, and
positions are read for windows only.
Nothing but the output and scratch memory is written; rows of the output depend on no other sequence.

Work: a program takes a tile of query rows of one sequence and one kv head, the G query heads of that head packed side
by side (row = token * G + head in group), and runs over the head's entries with an online softmax in float32 (Milakov
and Gimelshein 2018; Dao et al. 2022). Chunks of few rows get small tiles. Where the tiles do not fill the device, each
head's entries are split among programs (flash decoding), as many as the device's occupancy asks for, and a second
kernel merges the parts by their log-sum-exps.

Roofline, per sequence: bytes (tiles of rows) * 2 * K * D * itemsize per entry, from L2 for all but the first tile, plus
4 bytes of page id; FLOPs 4 * n * H * D per entry seen. Decoding is bound by bytes (G FLOPs a byte in 16 bits), chunks
of more than some 200 / G tokens by FLOPs.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_plan_triton import Launch, plan_launches, plan_unknown
from .attention_tile_triton import INDICES, LOG2_E, TABLE_STRIDES, attend_entries, find_tile, locate_head, row_heads
from .checks_triton import check_contiguous, check_device, check_dtype, check_float, check_pool, check_shape, check_step
from .tiles_triton import MAX_SPLITS, HeadShape, device_limits, padded

_VARYING = ["first_sequence", "last_sequence", "first_row", "shortest", "longest", "splits", "window"]


@triton.jit(do_not_specialize=_VARYING + TABLE_STRIDES, do_not_specialize_on_alignment=INDICES)
def _attention_kernel(
    query: tl.tensor,
    pool: tl.tensor,
    entry_positions: tl.tensor,
    page_table: tl.tensor,
    kept: tl.tensor,
    table_rows: tl.tensor | None,
    query_start: tl.tensor,
    positions: tl.tensor,
    visible: tl.tensor | None,
    sinks: tl.tensor | None,
    output: tl.tensor,
    log_sums: tl.tensor | None,
    stride_query_row: tl.tensor,
    stride_query_head: tl.tensor,
    stride_table_sequence: tl.tensor,
    stride_table_head: tl.tensor,
    stride_kept_sequence: tl.tensor,
    stride_kept_head: tl.tensor,
    first_sequence: tl.tensor,
    last_sequence: tl.tensor,
    first_row: tl.tensor,
    shortest: tl.tensor,
    longest: tl.tensor,
    splits: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor | None,
    softcap: tl.tensor | None,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
) -> None:
    """One tile of rows, one kv head (and part of its group), one part of its entries.

    Without SPLIT writes `output` [T, H, Dv] and `log_sums` [T, H] (natural); else both are scratch of
    [rows of the launch, H, splits(, Dv)], normalised per part and with log-sum-exps to base 2.
    """
    TOKENS: tl.constexpr = ROWS // GROUP_TILE
    sequence, first_token, start, length = find_tile(query_start, first_sequence, last_sequence, TOKENS, ONE_TILE)
    if (length <= shortest) | (length > longest) | (first_token >= length):
        return
    kv_head, token, head, real = row_heads(first_token, length, GROUP, GROUP_TILE, ROWS)
    table, held = locate_head(
        page_table, kept, table_rows, sequence, kv_head, stride_table_sequence,
        stride_table_head, stride_kept_sequence, stride_kept_head,
    )  # fmt: skip
    part = tl.program_id(2)
    accumulator, top, mass = attend_entries(
        query + (start + token).to(tl.int64) * stride_query_row + head * stride_query_head,
        positions + start, visible, pool, entry_positions, table, held, first_token, start, token, length, real, part,
        splits, scale, window, softcap,
        WIDTH, VALUE_WIDTH, PAGE, ROWS, ENTRIES, TOKENS, SPLIT, PADDED, VALUE_PADDED,
    )  # fmt: skip
    columns = tl.arange(0, VALUE_PADDED)
    if not SPLIT:
        if sinks is not None:
            sink = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * 1.4426950408889634
            new_top = tl.maximum(top, sink)
            shrink = tl.exp2(top - new_top)
            accumulator = accumulator * shrink[:, None]
            mass = mass * shrink + tl.exp2(sink - new_top)
            top = new_top
        place = (start + token).to(tl.int64) * HEADS + head
    else:
        place = ((start + token - first_row).to(tl.int64) * HEADS + head) * splits + part
    # A part without entries has mass 0: it becomes zeros, and its log-sum-exp -inf.
    divisor = tl.where(mass == 0.0, 1.0, mass)
    result = accumulator / divisor[:, None]
    tl.store(
        output + place[:, None] * VALUE_WIDTH + columns[None, :],
        result.to(output.dtype.element_ty),
        mask=real[:, None] & (columns < VALUE_WIDTH)[None, :],
    )
    if log_sums is not None:
        total = top + tl.log2(divisor)
        if not SPLIT:
            total = total * 0.6931471805599453
        tl.store(log_sums + place, total, mask=real)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=INDICES)
def _merge_kernel(
    parts: tl.tensor,
    part_log_sums: tl.tensor,
    query_start: tl.tensor,
    sinks: tl.tensor | None,
    output: tl.tensor,
    log_sums: tl.tensor | None,
    first_row: tl.tensor,
    first_sequence: tl.tensor,
    last_sequence: tl.tensor,
    shortest: tl.tensor,
    longest: tl.tensor,
    splits: tl.tensor,
    HEADS: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    MOST: tl.constexpr,
    CHUNK: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
) -> None:
    """Merge the parts of one row and head by their log-sum-exps; reads splits <= MOST times Dv + 1 float32."""
    local_row, head = tl.program_id(0), tl.program_id(1)
    row = first_row + local_row
    low, high = first_sequence, last_sequence
    while high - low > 1:
        middle = (low + high) // 2
        below = tl.load(query_start + middle) <= row
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    length = tl.load(query_start + low + 1) - tl.load(query_start + low)
    if (length <= shortest) | (length > longest):
        return
    first = (local_row.to(tl.int64) * HEADS + head) * splits
    index = tl.arange(0, MOST)
    sums = tl.load(part_log_sums + first + index, mask=index < splits, other=float("-inf"))
    top = tl.max(sums, axis=0)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(top, sink)
    top = tl.where(top == float("-inf"), 0.0, top)
    mass = tl.sum(tl.exp2(sums - top), axis=0)
    if sinks is not None:
        mass += tl.exp2(sink - top)
    columns = tl.arange(0, VALUE_PADDED)
    accumulator = tl.zeros([VALUE_PADDED], tl.float32)
    for begin in range(0, splits, CHUNK):
        some = begin + tl.arange(0, CHUNK)
        weight = tl.exp2(tl.load(part_log_sums + first + some, mask=some < splits, other=float("-inf")) - top)
        inside = (some < splits)[:, None] & (columns < VALUE_WIDTH)[None, :]
        values = tl.load(parts + (first + some)[:, None] * VALUE_WIDTH + columns[None, :], mask=inside, other=0.0)
        accumulator += tl.sum(values * weight[:, None], axis=0)
    place = row.to(tl.int64) * HEADS + head
    mass = tl.where(mass == 0.0, 1.0, mass)
    result = accumulator / mass
    tl.store(output + place * VALUE_WIDTH + columns, result.to(output.dtype.element_ty), mask=columns < VALUE_WIDTH)
    if log_sums is not None:
        tl.store(log_sums + place, (top + tl.log2(mass)) * 0.6931471805599453)


@dataclass(frozen=True, slots=True)
class _Inputs:
    """The arguments of `paged_attention`, checked."""

    query: Tensor
    pool: Tensor
    entry_positions: Tensor
    page_table: Tensor
    kept: Tensor
    query_start: Tensor
    query_lengths: tuple[int, ...] | None
    positions: Tensor
    max_kept: int
    value_dim: int
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    table_rows: Tensor | None
    visible: Tensor | None = None


def paged_attention_triton(
    query: Tensor,
    pool: Tensor,
    entry_positions: Tensor,
    page_table: Tensor,
    kept: Tensor,
    query_start: Tensor,
    query_lengths: tuple[int, ...] | None,
    positions: Tensor,
    *,
    max_kept: int,
    value_dim: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    table_rows: Tensor | None = None,
    visible: Tensor | None = None,
    log_sums: Tensor | None = None,
) -> Tensor:
    """`kernels.attention.paged_attention` on a GPU: [T, H, value_dim] in query's dtype.

    `kernels.attention_mass_triton` turns log_sums into the mass of each entry.

    Raises `TypeError` or `ValueError`, naming the tensor, for what the contract does not allow. query needs stride 1
    along D only; page_table and kept may be views into larger tables. Never syncs.
    """
    inputs = _Inputs(
        query, pool, entry_positions, page_table, kept, query_start, query_lengths, positions,
        max_kept, value_dim, scale, window, softcap, sinks, table_rows, visible,
    )  # fmt: skip
    _check(inputs)
    if log_sums is not None:
        check_shape("log_sums", log_sums, tuple(query.shape[:2]))
        check_dtype("log_sums", log_sums, torch.float32)
        check_contiguous("log_sums", log_sums)
        check_device(query.device, log_sums=log_sums)
    return _run(inputs, log_sums)


def _check(x: _Inputs) -> None:
    """Raise for the first argument that breaks the contract."""
    check_pool(x.pool, x.entry_positions)
    slots = None if x.table_rows is None else x.page_table.shape[0]
    check_step(x.query, x.pool, x.page_table, x.kept, x.query_start, x.query_lengths, x.positions, slots)
    if not 0 < x.value_dim <= x.pool.shape[3]:
        raise ValueError(f"value_dim must be between 1 and pool's head dim {x.pool.shape[3]}, got {x.value_dim}")
    if x.max_kept > x.page_table.shape[2] * x.pool.shape[2]:
        raise ValueError(f"page_table's {x.page_table.shape[2]} pages cannot hold max_kept = {x.max_kept} entries")
    if x.window is not None and x.window < 1:
        raise ValueError(f"window must be at least 1, got {x.window}")
    if x.sinks is not None:
        check_shape("sinks", x.sinks, (x.query.shape[1],))
        check_float("sinks", x.sinks)
        check_contiguous("sinks", x.sinks)
    if x.table_rows is not None:
        check_shape("table_rows", x.table_rows, (len(x.query_start) - 1,))
        check_dtype("table_rows", x.table_rows, torch.int64)
        check_contiguous("table_rows", x.table_rows)
    if x.visible is not None:
        check_shape("visible", x.visible, (x.query.shape[0],))
        check_dtype("visible", x.visible, torch.int64)
        check_contiguous("visible", x.visible)
    optional = {"sinks": x.sinks, "table_rows": x.table_rows, "visible": x.visible}
    check_device(x.query.device, entry_positions=x.entry_positions, **optional)


def _run(x: _Inputs, log_sums: Tensor | None) -> Tensor:
    """Launch the kernels that the batch needs; fills `log_sums` [T, H] if given."""
    output = x.query.new_empty(x.query.shape[0], x.query.shape[1], x.value_dim)
    shape = HeadShape(x.query.shape[2], x.value_dim, max(x.query.itemsize, x.pool.itemsize))
    heads, limits = (x.query.shape[1], x.page_table.shape[1]), device_limits(x.query.device)
    if x.query_lengths is None:
        launches = plan_unknown(len(x.query), len(x.query_start) - 1, *heads, x.max_kept, shape, limits)
    else:
        launches = plan_launches(x.query_lengths, *heads, x.max_kept, shape, limits)
    for launch in launches:
        if launch.splits == 1:
            _attend(x, launch, output, log_sums)
            continue
        sizes = (launch.num_rows, x.query.shape[1], launch.splits)
        parts = x.query.new_empty(*sizes, x.value_dim, dtype=torch.float32)
        part_log_sums = x.query.new_empty(sizes, dtype=torch.float32)
        _attend(x, launch, parts, part_log_sums)
        _merge(x, launch, parts, part_log_sums, output, log_sums)
    return output


def _attend(x: _Inputs, launch: Launch, output: Tensor, log_sums: Tensor | None) -> None:
    """Launch `_attention_kernel`."""
    kv_heads, tile = x.page_table.shape[1], launch.tile
    _attention_kernel[(launch.tiles, kv_heads * launch.group_tiles, launch.splits)](
        x.query, x.pool, x.entry_positions, x.page_table, x.kept, x.table_rows, x.query_start, x.positions,
        x.visible, x.sinks if launch.splits == 1 else None, output, log_sums,
        x.query.stride(0), x.query.stride(1), x.page_table.stride(0), x.page_table.stride(1),
        x.kept.stride(0), x.kept.stride(1),
        launch.first_sequence, launch.last_sequence, launch.first_row, launch.shortest, launch.longest, launch.splits,
        x.scale * LOG2_E if x.softcap is None else x.scale, x.window, x.softcap,
        GROUP=x.query.shape[1] // kv_heads, HEADS=x.query.shape[1], WIDTH=x.query.shape[2],
        VALUE_WIDTH=x.value_dim, PAGE=x.pool.shape[2], ROWS=tile.rows, ENTRIES=tile.entries,
        GROUP_TILE=launch.group_tile, ONE_TILE=launch.one_tile, SPLIT=launch.splits > 1,
        PADDED=padded(x.query.shape[2]), VALUE_PADDED=padded(x.value_dim),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _merge(
    x: _Inputs, launch: Launch, parts: Tensor, part_log_sums: Tensor, output: Tensor, log_sums: Tensor | None
) -> None:
    """Launch `_merge_kernel`."""
    _merge_kernel[(launch.num_rows, x.query.shape[1])](
        parts, part_log_sums, x.query_start, x.sinks, output, log_sums,
        launch.first_row, launch.first_sequence, launch.last_sequence, launch.shortest, launch.longest,
        launch.splits, HEADS=x.query.shape[1], VALUE_WIDTH=x.value_dim, MOST=MAX_SPLITS, CHUNK=16,
        VALUE_PADDED=padded(x.value_dim), num_warps=2,
    )  # fmt: skip
