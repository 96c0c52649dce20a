"""Device functions of the paged attention kernels: which rows a program has, and its run over a head's entries.

Positions, lengths and indices are 32 bits; offsets into pool and tables are 64 bits.
"""

# Arguments of device functions are values of Triton's language, which has no static types.
# mypy: allow-untyped-defs

import math

import triton
import triton.language as tl

LOG2_E = math.log2(math.e)
"""Scores are scaled by it, so that the softmax takes powers of two."""
# What differs from step to step and from layer to layer, numbers and where tables begin. A kernel compiled anew for a
# lucky value of one would hold up the step that meets it, and gain nothing.
TABLE_STRIDES = ["stride_table_sequence", "stride_table_head", "stride_kept_sequence", "stride_kept_head"]
INDICES = ["page_table", "kept", "table_rows", "query_start", "positions", "visible"]


@triton.jit
def find_tile(query_start, first_sequence, last_sequence, TOKENS: tl.constexpr, ONE_TILE: tl.constexpr):
    """(sequence, first token of the tile, first row of the sequence, its tokens) of this program's tile.

    Tiles of sequence s begin at (rows of the range before s) // TOKENS + s, which leaves each at least as many tiles
    as it needs; a surplus tile gets a first token past the sequence's last. Late tiles of a chunk see the most
    entries, so tiles are handed out from the last.
    """
    if ONE_TILE:
        sequence = first_sequence + tl.program_id(0)
        first_token = 0
        start = tl.load(query_start + sequence).to(tl.int32)
    else:
        tile = tl.num_programs(0) - 1 - tl.program_id(0)
        origin = tl.load(query_start + first_sequence).to(tl.int32)
        low = first_sequence
        high = last_sequence
        while high - low > 1:
            middle = (low + high) // 2
            before = (tl.load(query_start + middle).to(tl.int32) - origin) // TOKENS + middle - first_sequence
            low = tl.where(before <= tile, middle, low)
            high = tl.where(before <= tile, high, middle)
        sequence = low
        start = tl.load(query_start + sequence).to(tl.int32)
        first_token = (tile - ((start - origin) // TOKENS + sequence - first_sequence)) * TOKENS
    length = tl.load(query_start + sequence + 1).to(tl.int32) - start
    return sequence, first_token, start, length


@triton.jit
def row_heads(first_token, length, GROUP: tl.constexpr, GROUP_TILE: tl.constexpr, ROWS: tl.constexpr):
    """(kv head, token [ROWS], query head [ROWS], is it a row? [ROWS]) of this program's rows."""
    group_tiles: tl.constexpr = (GROUP + GROUP_TILE - 1) // GROUP_TILE
    kv_head = tl.program_id(1) // group_tiles
    row = tl.arange(0, ROWS)
    token = first_token + row // GROUP_TILE
    in_group = row % GROUP_TILE + (tl.program_id(1) % group_tiles) * GROUP_TILE
    # Rows past TOKENS * GROUP_TILE would repeat the next tile's first token.
    real = (token < length) & (in_group < GROUP) & (row < ROWS // GROUP_TILE * GROUP_TILE)
    return kv_head, token, kv_head * GROUP + in_group, real


@triton.jit
def locate_head(
    page_table, kept, table_rows, sequence, kv_head, stride_table_sequence, stride_table_head, stride_kept_sequence,
    stride_kept_head,
):  # fmt: skip
    """(pointer to the head's row of the page table, entries it held before the step)."""
    row = sequence.to(tl.int64)
    if table_rows is not None:
        row = tl.load(table_rows + row)
    table = page_table + row * stride_table_sequence + kv_head.to(tl.int64) * stride_table_head
    return table, tl.load(kept + row * stride_kept_sequence + kv_head * stride_kept_head)


@triton.jit
def cap_scores(scores, scale, softcap):
    """Products of queries and keys -> scores to base 2; `scale` holds log2(e) already where there is no softcap.

    tanh(x) = 1 - 2 / (exp(2 x) + 1): exact at both ends, where exp is 0 or infinite.
    """
    if softcap is None:
        scores = scores * scale
    else:
        twice = tl.exp2(scores * (scale * 2.8853900817779268 / softcap))
        scores = (1.0 - 2.0 / (twice + 1.0)) * (softcap * 1.4426950408889634)
    return scores


@triton.jit
def part_of_entries(begin, end, part, splits, ENTRIES: tl.constexpr, SPLIT: tl.constexpr):
    """(first, end) of this part of the entries begin .. end - 1, in multiples of ENTRIES; may be empty."""
    first = begin
    last = end
    if SPLIT:
        share = tl.cdiv(tl.cdiv(end - begin, ENTRIES), splits) * ENTRIES
        first = begin + part * share
        last = tl.minimum(first + share, end)
    return first, last


@triton.jit
def first_visible(held, first_token, window, visible):
    """Index of the first entry that any row of the tile may see, rounded towards 0.

    Once a tile's first token is `window` tokens into the chunk, every kept entry and the chunk's beginning are past
    all its windows; before that, kept entries may lie at any distance, and positions decide. Tokens with masks are no
    chain, their positions always decide.
    """
    begin = held * 0
    if window is not None and visible is None:
        begin = tl.where(first_token >= window, held + first_token - window + 1, 0)
    return begin


@triton.jit
def attend_entries(
    query_rows, positions, visible, pool, entry_positions, table, held, first_token, start, token, length, real, part,
    splits, scale, window, softcap,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, ENTRIES: tl.constexpr,
    TOKENS: tl.constexpr, SPLIT: tl.constexpr, PADDED: tl.constexpr, VALUE_PADDED: tl.constexpr,
):  # fmt: skip
    """Online softmax of the rows over their part of the entries.

    Returns (sums of weighted values [ROWS, VALUE_PADDED], highest score to base 2 [ROWS], mass [ROWS]), the last two
    relative to each other: the weights of a row add up to mass * 2 ** highest.
    """
    columns = tl.arange(0, PADDED)
    q = tl.load(query_rows[:, None] + columns[None, :], mask=real[:, None] & (columns < WIDTH)[None, :], other=0.0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    accumulator = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    end = held + tl.minimum(first_token + TOKENS, length)
    begin = first_visible(held, first_token, window, visible)
    first, last = part_of_entries(begin, end, part, splits, ENTRIES, SPLIT)
    # Up to here every row of the tile sees every entry: no mask is needed.
    plain = first
    query_position = token
    TREES: tl.constexpr = visible is not None
    row_mask = token
    if TREES:
        row_mask = tl.load(visible + start + token, mask=real, other=0)
    if window is None:
        clear = tl.minimum(held + first_token + 1, last)
        if TREES:
            clear = tl.minimum(held, last)
        plain = first + tl.maximum(clear - first, 0) // ENTRIES * ENTRIES
        for entry in range(first, plain, ENTRIES):
            accumulator, top, mass = attend_block(
                q, pool, entry_positions, table, entry, last, held, token, query_position, row_mask, accumulator, top,
                mass, scale, window, softcap, TREES, False, WIDTH, VALUE_WIDTH, PAGE, ENTRIES, PADDED, VALUE_PADDED,
            )  # fmt: skip
    else:
        query_position = tl.load(positions + token, mask=real, other=0).to(tl.int32)
    for entry in range(plain, last, ENTRIES):
        accumulator, top, mass = attend_block(
            q, pool, entry_positions, table, entry, last, held, token, query_position, row_mask, accumulator, top,
            mass, scale, window, softcap, TREES, True, WIDTH, VALUE_WIDTH, PAGE, ENTRIES, PADDED, VALUE_PADDED,
        )  # fmt: skip
    return accumulator, top, mass


@triton.jit
def attend_block(
    q, pool, entry_positions, table, entry, last, held, token, query_position, row_mask, accumulator, top,
    mass, scale, window, softcap, TREES: tl.constexpr, MASKED: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PAGE: tl.constexpr, ENTRIES: tl.constexpr,
    PADDED: tl.constexpr, VALUE_PADDED: tl.constexpr,
):  # fmt: skip
    """Take in ENTRIES entries from `entry` on; with MASKED, those each row may see, with TREES by its mask too."""
    index = entry + tl.arange(0, ENTRIES)
    inside = index < last
    pages = tl.load(table + index // PAGE, mask=inside, other=0) if MASKED else tl.load(table + index // PAGE)
    keys = pool + (pages.to(tl.int64) * (2 * PAGE * WIDTH) + (index % PAGE) * WIDTH)[:, None]
    k = load_columns(keys, inside, MASKED, WIDTH, PADDED).to(q.dtype)
    scores = cap_scores(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap)
    if MASKED:
        visible = inside[None, :] & (index[None, :] <= (held + token)[:, None])
        if TREES:
            new_row = index - held
            named = (row_mask[:, None] >> tl.minimum(tl.maximum(new_row, 0), 63).to(tl.int64)[None, :]) & 1
            by_mask = (new_row < 0)[None, :] | ((named != 0) & (new_row < 64)[None, :])
            visible = visible & (by_mask | (row_mask == 0)[:, None])
        if window is not None:
            position = tl.load(entry_positions + pages.to(tl.int64) * PAGE + index % PAGE, mask=inside, other=0)
            visible = visible & (position[None, :] > query_position[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    # A row that has seen nothing yet keeps -inf; subtracting it from itself would give NaN.
    base = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    v = load_columns(keys + PAGE * WIDTH, inside, MASKED, VALUE_WIDTH, VALUE_PADDED).to(q.dtype)
    accumulator = tl.dot(weights.to(q.dtype), v, accumulator * shrink[:, None], input_precision="ieee")
    return accumulator, new_top, mass * shrink + tl.sum(weights, axis=1)


@triton.jit
def load_columns(rows, inside, MASKED: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """[entries, PADDED] from `rows` [entries, 1], zero past WIDTH and, with MASKED, where not `inside`.

    A tile of values must not hold what lies behind a head's last entry: NaN times a weight of zero is NaN.
    """
    columns = tl.arange(0, PADDED)
    if MASKED:
        tile = tl.load(rows + columns[None, :], mask=inside[:, None] & (columns < WIDTH)[None, :], other=0.0)
    elif WIDTH == PADDED:
        tile = tl.load(rows + columns[None, :])
    else:
        tile = tl.load(rows + columns[None, :], mask=(columns < WIDTH)[None, :], other=0.0)
    return tile
