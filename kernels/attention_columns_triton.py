"""How much attention entries get from given rows, in Triton: for rows whose log-sum-exps nobody has kept.

Contract: that of `kernels.attention_columns.attention_columns`; letters as there. Two passes of one kernel over the
keys, in which a program owns a tile of entries: the first gives each row's log-sum-exp over every tile, which torch
adds up (with the sinks), the second the probabilities, summed or their greatest. Rows are taken in slices, so that what
the first pass leaves stays small.

Roofline: reads the keys twice, K * E * D * itemsize bytes each, and the rows once per tile of entries (from L2); writes
n * H * 4 bytes per tile and K * E * 4. FLOPs 4 * n * H * E * D.
"""

import math
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_mass_triton import mass_tile
from .attention_tile_triton import cap_scores, load_columns
from .checks_triton import (
    INDEX_TYPES,
    check_contiguous,
    check_device,
    check_dtype,
    check_float,
    check_rows,
    check_shape,
)
from .paged_rows import PagedRows
from .tiles_triton import padded

MAX_SUMS = 1 << 22
"""Most log-sum-exps of rows over tiles that exist at a time (16 MiB)."""
_VARYING = ["rows", "entries", "stride_key_table", "stride_position_table"]
_INDICES = ["key_table", "position_table", "lengths", "positions"]


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_INDICES)
def _columns_kernel(
    query: tl.tensor,
    keys: tl.tensor,
    entry_positions: tl.tensor,
    key_table: tl.tensor,
    position_table: tl.tensor,
    lengths: tl.tensor,
    positions: tl.tensor,
    log_sums: tl.tensor | None,
    output: tl.tensor,
    stride_query_row: tl.tensor,
    stride_query_head: tl.tensor,
    stride_key_page: tl.tensor,
    stride_position_page: tl.tensor,
    stride_key_table: tl.tensor,
    stride_position_table: tl.tensor,
    rows: tl.tensor,
    entries: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor | None,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEY_PAGE: tl.constexpr,
    POSITION_PAGE: tl.constexpr,
    GREATEST: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    PADDED: tl.constexpr,
) -> None:
    """ENTRIES entries of one kv head: rows are (token, head in group) pairs, ROWS at a time.

    Without `log_sums` [n, H] (natural) `output` gets them for this tile, [tiles, n, H]; with them [K, E] probabilities.
    """
    tile, kv_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    index = tile * ENTRIES + tl.arange(0, ENTRIES)
    inside = index < tl.minimum(tl.load(lengths + kv_head).to(tl.int32), entries)
    pages = tl.load(key_table + kv_head * stride_key_table + index // KEY_PAGE, mask=inside, other=0).to(tl.int64)
    k = load_columns(
        keys + (pages * stride_key_page + (index % KEY_PAGE) * WIDTH)[:, None], inside, True, WIDTH, PADDED
    ).to(query.dtype.element_ty)
    places = position_table + kv_head * stride_position_table + index // POSITION_PAGE
    pages = tl.load(places, mask=inside, other=0).to(tl.int64)
    held = tl.load(entry_positions + pages * stride_position_page + index % POSITION_PAGE, mask=inside, other=0)
    columns = tl.arange(0, PADDED)
    total = tl.zeros([ENTRIES], tl.float32)
    for first in range(0, rows * GROUP, ROWS):
        row = first + tl.arange(0, ROWS)
        token, head = (row // GROUP).to(tl.int64), kv_head * GROUP + row % GROUP
        real = token < rows
        q = tl.load(
            query + (token * stride_query_row + head * stride_query_head)[:, None] + columns[None, :],
            mask=real[:, None] & (columns < WIDTH)[None, :], other=0.0,
        )  # fmt: skip
        position = tl.load(positions + token, mask=real, other=0).to(tl.int32)
        visible = real[:, None] & inside[None, :] & (held[None, :] <= position[:, None])
        scores = cap_scores(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap)
        place = token * HEADS + head
        if log_sums is None:
            scores = tl.where(visible, scores, float("-inf"))
            top = tl.max(scores, axis=1)
            top = tl.where(top == float("-inf"), 0.0, top)
            sums = top + tl.log2(tl.sum(tl.exp2(scores - top[:, None]), axis=1))
            tl.store(output + tile.to(tl.int64) * rows * HEADS + place, sums * 0.6931471805599453, mask=real)
        else:
            log_sum = tl.load(log_sums + place, mask=real, other=0.0) * 1.4426950408889634
            weights = tl.where(visible, tl.exp2(scores - log_sum[:, None]), 0.0)
            if GREATEST:
                total = tl.maximum(total, tl.max(weights, axis=0))
            else:
                total += tl.sum(weights, axis=0)
    if log_sums is not None:
        tl.store(output + kv_head * entries + index, total, mask=index < entries)


def attention_columns_triton(
    query: Tensor,
    keys: PagedRows,
    entry_positions: PagedRows,
    lengths: Tensor,
    positions: Tensor,
    *,
    reduce: Literal["sum", "max"],
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`kernels.attention_columns.attention_columns` on a GPU; query needs stride 1 along D only.

    Raises `TypeError` or `ValueError` naming the tensor; never syncs.
    """
    _check(query, keys, entry_positions, lengths, positions)
    heads, kv_heads, entries = query.shape[1], len(keys.table), keys.entries
    result = torch.zeros(kv_heads, entries, device=query.device)
    rows, size = mass_tile(len(query) * heads // kv_heads, query.shape[2], query, keys.pages)
    tiles = triton.cdiv(entries, size)
    step = max(1, MAX_SUMS // max(1, tiles * heads))
    for first in range(0, len(query) if entries else 0, step):
        some, where = query[first : first + step], positions[first : first + step]
        parts = torch.empty(tiles, len(some), heads, device=query.device)
        given = (some, keys, entry_positions, lengths, where)
        options = {"scale": scale * math.log2(math.e) if softcap is None else scale, "softcap": softcap}
        sizes = {"GREATEST": False, "ROWS": rows, "ENTRIES": size}
        _launch(*given, None, parts, options, sizes)
        sums = parts.logsumexp(0)
        if sinks is not None:
            sums = torch.logaddexp(sums, sinks.float())
        new = torch.empty_like(result)
        _launch(*given, sums, new, options, sizes | {"GREATEST": reduce == "max"})
        result = torch.maximum(result, new) if reduce == "max" else result.add_(new)
    return result


def _launch(
    query: Tensor,
    keys: PagedRows,
    entry_positions: PagedRows,
    lengths: Tensor,
    positions: Tensor,
    log_sums: Tensor | None,
    output: Tensor,
    options: dict[str, float | None],
    sizes: dict[str, int],
) -> None:
    """One pass."""
    (rows, heads, width), kv_heads = query.shape, len(keys.table)
    _columns_kernel[(triton.cdiv(keys.entries, sizes["ENTRIES"]), kv_heads)](
        query, keys.pages, entry_positions.pages, keys.table, entry_positions.table, lengths, positions,
        log_sums, output, query.stride(0), query.stride(1), keys.pages.stride(0), entry_positions.pages.stride(0),
        keys.table.stride(0), entry_positions.table.stride(0), rows, keys.entries, **options,
        GROUP=heads // kv_heads, HEADS=heads, WIDTH=width, KEY_PAGE=keys.pages.shape[1],
        POSITION_PAGE=entry_positions.pages.shape[1], **sizes, PADDED=padded(width), num_warps=4, num_stages=2,
    )  # fmt: skip


def _check(query: Tensor, keys: PagedRows, entry_positions: PagedRows, lengths: Tensor, positions: Tensor) -> None:
    """Raise for the first argument that breaks the contract."""
    check_shape("query", query, (None, None, None))
    check_float("query", query)
    check_rows("query", query)
    check_shape("keys.pages", keys.pages, (None, None, query.shape[2]))
    check_float("keys.pages", keys.pages)
    check_shape("entry_positions.pages", entry_positions.pages, (None, None))
    check_dtype("entry_positions.pages", entry_positions.pages, torch.int32)
    for name, paged in (("keys", keys), ("entry_positions", entry_positions)):
        if len(paged.pages):
            check_contiguous(f"a page of {name}", paged.pages[0])
        check_shape(f"{name}.table", paged.table, (len(keys.table), None))
        check_dtype(f"{name}.table", paged.table, torch.int32)
        check_rows(f"{name}.table", paged.table)
    if query.shape[1] % len(keys.table):
        raise ValueError(f"query has {query.shape[1]} heads, no multiple of the {len(keys.table)} of keys.table")
    for name, tensor, count in (("lengths", lengths, len(keys.table)), ("positions", positions, len(query))):
        check_shape(name, tensor, (count,))
        check_dtype(name, tensor, *INDEX_TYPES)
        check_contiguous(name, tensor)
    check_device(query.device, keys=keys.pages, entry_positions=entry_positions.pages, lengths=lengths)
    check_device(query.device, keys_table=keys.table, positions_table=entry_positions.table, positions=positions)
