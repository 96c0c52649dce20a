"""Which kernel launches a ragged batch needs: pure host arithmetic over query lengths, planned once per step.

Sequences are sorted into classes by how many query rows (tokens times grouped heads) they bring: decodes, chunks to
verify, prompt chunks. A class is one launch over the range of sequences that holds all of it; the range may hold
others, whose programs end at once. Batches come with their decodes first, so that ranges hardly overlap.
"""

from dataclasses import dataclass
from functools import lru_cache

from .tiles_triton import (
    CHUNK_ROWS,
    DECODE_ROWS,
    VERIFY_ROWS,
    DeviceLimits,
    HeadShape,
    Tile,
    choose_tile,
    resident_programs,
    split_count,
)

_ANY_LENGTH = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: the sequences `first_sequence` .. `last_sequence` - 1 with shortest < n <= longest."""

    tile: Tile
    group_tile: int
    """Query heads of one group that a tile holds; the group takes `group_tiles` tiles."""
    group_tiles: int
    one_tile: bool
    """Each sequence's rows fit one tile: tile i belongs to sequence i of the range."""
    tiles: int
    """Upper bound on the tiles of rows of the range."""
    splits: int
    """Parts of each head's entries."""
    first_sequence: int
    last_sequence: int
    first_row: int
    """Row of the batch at which the range begins."""
    num_rows: int
    """Rows of the range."""
    shortest: int
    longest: int


@lru_cache(maxsize=64)
def plan_launches(
    query_lengths: tuple[int, ...],
    heads: int,
    kv_heads: int,
    max_kept: int,
    shape: HeadShape,
    limits: DeviceLimits,
) -> tuple[Launch, ...]:
    """The launches of one attention layer; equal for all layers of a step that have the same shape.

    query_lengths: new tokens of each sequence; max_kept: entries of the longest head.
    """
    group = heads // kv_heads
    bounds = (0, DECODE_ROWS // group, VERIFY_ROWS // group, _ANY_LENGTH)
    launches = []
    for rows, shortest, longest in zip((DECODE_ROWS, VERIFY_ROWS, CHUNK_ROWS), bounds, bounds[1:], strict=False):
        members = [i for i, n in enumerate(query_lengths) if shortest < n <= longest]
        if not members:
            continue
        tile = choose_tile(rows, shape, limits)
        resident = resident_programs(tile, shape, limits)
        launches.append(_launch(query_lengths, members, tile, resident, (shortest, longest), group, kv_heads, max_kept))
    return tuple(launches)


_ROWS_GUESSED = 4
"""Rows of a sequence whose number the device alone knows: the fewer the sequences, the more parts their heads need."""


@lru_cache(maxsize=64)
def plan_unknown(
    rows: int, sequences: int, heads: int, kv_heads: int, max_kept: int, shape: HeadShape, limits: DeviceLimits
) -> tuple[Launch, ...]:
    """The one launch for `rows` rows that belong to up to `sequences` sequences in any way: a CUDA graph's.

    A sequence may be without rows. The tiles are those of chunks to verify, as many as any division of the rows needs.
    """
    tile = choose_tile(VERIFY_ROWS, shape, limits)
    group = heads // kv_heads
    group_tile = min(group, tile.rows)
    group_tiles, tokens = -(-group // group_tile), tile.rows // group_tile
    working = -(-rows // _ROWS_GUESSED) * kv_heads * group_tiles
    entries = -(-max_kept // tile.entries) * tile.entries
    splits = split_count(working, resident_programs(tile, shape, limits), entries, tile.entries)
    tiles = rows // tokens + sequences
    return (Launch(tile, group_tile, group_tiles, False, tiles, splits, 0, sequences, 0, rows, 0, _ANY_LENGTH),)


def _launch(
    lengths: tuple[int, ...],
    members: list[int],
    tile: Tile,
    resident: int,
    bounds: tuple[int, int],
    group: int,
    kv_heads: int,
    max_kept: int,
) -> Launch:
    """The launch of one class, whose members are the given sequences."""
    first, last = members[0], members[-1] + 1
    group_tile = min(group, tile.rows)
    group_tiles = -(-group // group_tile)
    tokens = tile.rows // group_tile
    one_tile = bounds[1] <= tokens
    num_rows = sum(lengths[first:last])
    # A sequence's tiles begin at its first row / tokens + its number: never fewer than it needs, see `find_tile`.
    tiles = last - first if one_tile else num_rows // tokens + last - first
    working = sum(-(-lengths[i] // tokens) for i in members) * kv_heads * group_tiles
    entries = -(-max_kept // tile.entries) * tile.entries
    splits = split_count(working, resident, entries, tile.entries)
    return Launch(
        tile, group_tile, group_tiles, one_tile, tiles, splits, first, last, sum(lengths[:first]), num_rows, *bounds
    )
