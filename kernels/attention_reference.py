"""Attention over the paged KV cache in plain torch: the oracle of the contract in `kernels.attention`.

It computes runs of sequences with equal n together (all decodes are one run) over a copy of their pages; on a CPU no
run gathers beyond its longest head. Letters as there.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_SCORES = 1 << 22
"""Most score elements that one slice of queries materialises (16 MiB of float32)."""
_NOWHERE = 2**31 - 1
"""Position of what is no entry: later than every query."""


@dataclass(frozen=True, slots=True)
class _Scoring:
    """How a query and a key become a weight."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None


@dataclass(frozen=True, slots=True)
class _Masks:
    """What rows see of their sequence's new rows."""

    visible: Tensor
    """[S, n] int64"""
    kept: Tensor
    """[S, K]"""

    def seen(self, rows: slice, entries: int) -> Tensor:
        """[S * K, rows, E] bool: which of so many entries the masks do not take away."""
        new_row = torch.arange(entries, device=self.kept.device) - self.kept.reshape(-1, 1, 1)
        masks = self.visible[:, rows].repeat_interleave(self.kept.shape[1], dim=0)[:, :, None]
        named = (masks >> new_row.clamp(0, 63)) & 1 == 1
        return (masks == 0) | (new_row < 0) | (named & (new_row < 64))


def paged_attention_reference(
    query: Tensor,
    pool: Tensor,
    entry_positions: Tensor,
    page_table: Tensor,
    kept: Tensor,
    query_start: Tensor,
    query_lengths: tuple[int, ...],
    positions: Tensor,
    *,
    max_kept: int,
    value_dim: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """See `kernels.attention.paged_attention`."""
    output = query.new_empty(query.shape[0], query.shape[1], value_dim)
    scoring = _Scoring(scale, window, softcap, sinks)
    for sequences, rows, length in _runs(query_lengths):
        totals = kept[sequences].reshape(-1).long() + length
        # The bound over this layer's heads is cheaper to read than pages are to gather; on a GPU reading it would sync.
        longest = max_kept if kept.is_cuda else min(max_kept, int(totals.max()))
        keys, values, entry_position = gather_pages(pool, entry_positions, page_table[sequences], totals, longest)
        queries, query_positions = query[rows].unflatten(0, (-1, length)), positions[rows].view(-1, length)
        cached = (keys.to(query.dtype), values.to(query.dtype), entry_position)
        masks = None if visible is None else _Masks(visible[rows].view(-1, length), kept[sequences])
        output[rows] = _attend_run(queries, *cached, query_positions, scoring, masks)[..., :value_dim].flatten(0, 1)
    return output


def _runs(query_lengths: tuple[int, ...]) -> Iterator[tuple[slice, slice, int]]:
    """(sequences, their rows, rows of each) of every run of sequences that bring equally many rows, but for none."""
    sequence = row = 0
    for length, run in itertools.groupby(query_lengths):
        count = sum(1 for _ in run)
        if length:
            yield slice(sequence, sequence + count), slice(row, row + count * length), length
        sequence, row = sequence + count, row + count * length


def gather_pages(
    pool: Tensor, entry_positions: Tensor, page_table: Tensor, totals: Tensor, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Copy the pages of S * K = N heads side by side: keys, values [N, E, D], positions [N, E] (int32).

    totals [N]: entries of each head; past them the positions are `_NOWHERE`.
    """
    num_pages, _, page_size, width = pool.shape
    columns = -(-longest // page_size)
    table = page_table[:, :, :columns].reshape(-1, columns).long()
    # Columns past a head's end become its own first page: a stranger's page could hold NaN, and 0 * NaN is NaN.
    starts = torch.arange(columns, device=pool.device) * page_size
    table = torch.where(starts < totals[:, None], table, table[:, :1]).view(-1)
    halves = pool.view(num_pages * 2, page_size * width)
    shape = (totals.shape[0], columns * page_size, width)
    keys = halves.index_select(0, table * 2).view(shape)
    values = halves.index_select(0, table * 2 + 1).view(shape)
    entry_position = entry_positions.index_select(0, table).view(shape[:2])
    missing = torch.arange(shape[1], device=pool.device) >= totals[:, None]
    return keys, values, entry_position.masked_fill_(missing, _NOWHERE)


def _attend_run(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    entry_position: Tensor,
    positions: Tensor,
    scoring: _Scoring,
    masks: _Masks | None,
) -> Tensor:
    """Attention of sequences with equally many rows: query [S, n, H, D], keys/values [S * K, E, D] -> [S, n, H, D].

    entry_position [S * K, E] int32 is `_NOWHERE` where there is no entry; positions [S, n]. Queries are taken in
    slices so that no more than about `MAX_SCORES` scores exist at a time.
    """
    num_sequences, length, num_heads, width = query.shape
    num_kv_heads = keys.shape[0] // num_sequences
    group = num_heads // num_kv_heads
    sinks = None if scoring.sinks is None else scoring.sinks.float().view(num_kv_heads, group)
    # [S, n, K, G, D] -> [S * K, G, n, D]: the G query heads of a kv head become rows of one matrix product.
    folded = query.view(num_sequences, length, num_kv_heads, group, width).permute(0, 2, 3, 1, 4)
    step = max(1, MAX_SCORES // (num_sequences * num_heads * keys.shape[1]))
    parts = []
    for first in range(0, length, step):
        part = folded[..., first : first + step, :]
        rows = part.shape[3]
        visible = _visible(entry_position, positions[:, first : first + step], num_kv_heads, scoring.window)
        if masks is not None:
            visible &= masks.seen(slice(first, first + step), keys.shape[1])
        visible = visible[:, None].expand(-1, group, -1, -1).reshape(keys.shape[0], group * rows, -1)
        flat = part.reshape(keys.shape[0], group * rows, width)
        if scoring.softcap is None and sinks is None:
            result = F.scaled_dot_product_attention(
                flat[:, None], keys[:, None], values[:, None], visible[:, None], scale=scoring.scale
            )
        else:
            row_sinks = None if sinks is None else sinks.repeat(num_sequences, 1).repeat_interleave(rows, dim=1)
            result = _explicit_attention(flat, keys, values, visible, scoring, row_sinks)
        parts.append(result.view(num_sequences, num_kv_heads, group, rows, width))
    merged = parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)
    return merged.permute(0, 3, 1, 2, 4).reshape(num_sequences, length, num_heads, width)


def _visible(entry_position: Tensor, positions: Tensor, num_kv_heads: int, window: int | None) -> Tensor:
    """[S * K, n, E] bool: which entries each query may see."""
    query_position = positions.to(torch.int32).repeat_interleave(num_kv_heads, dim=0)[:, :, None]
    entry = entry_position[:, None]
    visible = entry <= query_position
    if window is not None:
        visible &= entry > query_position - window
    return visible


def _explicit_attention(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scoring: _Scoring, sinks: Tensor | None
) -> Tensor:
    """Softcapped or sunk attention in float32: query [N, R, D], keys/values [N, E, D], sinks [N, R] -> [N, R, D]."""
    scores = torch.bmm(query.float(), keys.float().transpose(1, 2)).mul_(scoring.scale)
    if scoring.softcap is not None:
        scores = scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
    scores.masked_fill_(~visible, float("-inf"))
    top = scores.amax(-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks[..., None])
    weights = scores.sub_(top).exp_()
    mass = weights.sum(-1, keepdim=True)
    if sinks is not None:
        mass += torch.exp(sinks[..., None] - top)
    return torch.bmm(weights, values.float()).div_(mass).to(query.dtype)
