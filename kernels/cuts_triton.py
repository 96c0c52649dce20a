"""Where top-k, top-p and min-p cut the rows of a batch, in Triton: by search for a threshold, nothing is sorted.

Contract: a cut is two numbers per row, `least` and `last`: kept are the scaled logits above `least`, and those equal to
it up to token id `last`. They are the tokens that `kernels.sampling.sample_truncated` draws from. Letters as there.

Masses are whole numbers, exp(x) in units of 2^-44: their sums do not depend on an order, so a row's cut depends on
nothing beside it, and partial sums over chunks can be subtracted. A token's mass is at most half a unit away, a row's
of 2^19 tokens 2^-26, less than float32 knows of one exp.

Work: a first pass counts tokens and mass above a few fixed thresholds; the lowest that is needed picks the candidates,
which a second pass gathers in the order of their ids, each chunk at a place of its own (prefix sums of the counts). In
that list, mostly some hundreds long, the exact threshold is found by bisection of the numbers' bits, a program per row.
Only a nearly flat row, where the list is the whole vocabulary, reads all of it again in each of 31 turns.

Roofline, per cut row: 2 V reads of 4 bytes (9 with penalties); scratch of 8 V bytes, of which the list is written.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows_triton import EXACT, LogitRows, adjusted, check_parameters, row_peak, scaled

_PIVOTS = 8
"""Fixed thresholds; the last is below everything."""


@dataclass(frozen=True, slots=True)
class Truncation:
    """How rows are cut beside min-p, as `kernels.sampling.sample_truncated` takes it."""

    top_k: Tensor
    """[R] int64; all tokens if < 1."""
    top_p: Tensor
    """[R] float32."""


@triton.jit
def _pivot(index: tl.tensor) -> tl.tensor:
    """The scaled logits -1/2, -2, -9/2, -8 ... and, as the last, one below all that are finite."""
    step = index.to(tl.float32) + 1.0
    return tl.where(index == 7, -3.4e38, -0.5 * step * step)


@triton.jit
def _mass(x: tl.tensor) -> tl.tensor:
    """exp(x), x <= 0, in units of 2^-44: int64."""
    return (tl.exp(x) * 17592186044416.0 + 0.5).to(tl.int64)


@triton.jit
def _order(x: tl.tensor) -> tl.tensor:
    """int32 that compare as the float32 do."""
    x = tl.where(x == 0.0, 0.0, x)  # there are two zeros, equal as floats only
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _is_cut(temperature: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, row: tl.tensor) -> tl.tensor:
    """Whether top-k or top-p drops any of the row's tokens."""
    return (tl.load(temperature + row) > 0.0) & ((tl.load(top_k + row) > 0) | (tl.load(top_p + row) < 1.0))


@triton.jit
def _goal(top_p: tl.tensor, mass: tl.tensor) -> tl.tensor:
    """Mass, of all that there is, that the kept tokens must reach."""
    goal = tl.ceil(top_p.to(tl.float64) * mass.to(tl.float64)).to(tl.int64)
    return tl.minimum(tl.maximum(goal, 1), mass)


@triton.jit(do_not_specialize=["prefix_width"])
def _tally_kernel(
    logits: tl.tensor,
    slots: tl.tensor | None,
    output_counts: tl.tensor | None,
    in_prompt: tl.tensor | None,
    strengths: tl.tensor | None,
    prefix: tl.tensor | None,
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    peaks: tl.tensor,
    counts: tl.tensor,
    masses: tl.tensor,
    stride_row: tl.tensor,
    VOCABULARY: tl.constexpr,
    prefix_width: tl.tensor,
    CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    PIVOTS: tl.constexpr,
) -> None:
    """Tokens and mass of one chunk of one row not below each pivot; grid (R, CHUNKS)."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if not _is_cut(temperature, top_k, top_p, row):
        return
    token = chunk * BLOCK + tl.arange(0, BLOCK)
    x = adjusted(
        logits, slots, output_counts, in_prompt, strengths, prefix, row, token, stride_row, VOCABULARY, prefix_width
    )
    x = scaled(x, row_peak(peaks, row, CHUNKS, CHUNKS_PADDED), tl.load(temperature + row))
    mass = _mass(x)
    for pivot in tl.static_range(PIVOTS):
        above = x >= _pivot(tl.full([], pivot, tl.int32))
        place = (row * PIVOTS + pivot) * CHUNKS + chunk
        tl.store(counts + place, tl.sum(above.to(tl.int32), axis=0))
        tl.store(masses + place, tl.sum(tl.where(above, mass, 0), axis=0))


@triton.jit
def _choose_kernel(
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    counts: tl.tensor,
    masses: tl.tensor,
    choice: tl.tensor,
    ends: tl.tensor,
    CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    PIVOTS: tl.constexpr,
) -> None:
    """The highest pivot above which all of one row's kept tokens are, and where each chunk's end in its list;
    grid (R,)."""
    row = tl.program_id(0).to(tl.int64)
    if not _is_cut(temperature, top_k, top_p, row):
        return
    chunk = tl.arange(0, CHUNKS_PADDED)
    pivots = tl.arange(0, PIVOTS)
    places = (row * PIVOTS + pivots[:, None]) * CHUNKS + chunk[None, :]
    inside = (chunk < CHUNKS)[None, :] & (pivots >= 0)[:, None]
    count = tl.sum(tl.load(counts + places, mask=inside, other=0), axis=1).to(tl.int64)
    mass = tl.sum(tl.load(masses + places, mask=inside, other=0), axis=1)
    most = tl.load(top_k + row)
    if most > 0:
        enough = count >= tl.minimum(most, tl.max(count, axis=0))
    else:
        enough = mass >= _goal(tl.load(top_p + row), tl.max(mass, axis=0))
    chosen = PIVOTS - tl.sum(enough.to(tl.int32), axis=0)
    tl.store(choice + row, chosen)
    held = tl.load(counts + (row * PIVOTS + chosen) * CHUNKS + chunk, mask=chunk < CHUNKS, other=0)
    tl.store(ends + row * CHUNKS + chunk, tl.cumsum(held, axis=0), mask=chunk < CHUNKS)


@triton.jit(do_not_specialize=["prefix_width"])
def _gather_kernel(
    logits: tl.tensor,
    slots: tl.tensor | None,
    output_counts: tl.tensor | None,
    in_prompt: tl.tensor | None,
    strengths: tl.tensor | None,
    prefix: tl.tensor | None,
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    peaks: tl.tensor,
    choice: tl.tensor,
    ends: tl.tensor,
    values: tl.tensor,
    tokens: tl.tensor,
    stride_row: tl.tensor,
    VOCABULARY: tl.constexpr,
    prefix_width: tl.tensor,
    CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The candidates of one chunk of one row go to their places in the row's list; grid (R, CHUNKS)."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if not _is_cut(temperature, top_k, top_p, row):
        return
    end = tl.load(ends + row * CHUNKS + chunk)
    first = tl.load(ends + row * CHUNKS + chunk - 1, mask=chunk > 0, other=0)
    if first < end:
        token = chunk * BLOCK + tl.arange(0, BLOCK)
        x = adjusted(
            logits, slots, output_counts, in_prompt, strengths, prefix, row, token, stride_row, VOCABULARY, prefix_width
        )
        x = scaled(x, row_peak(peaks, row, CHUNKS, CHUNKS_PADDED), tl.load(temperature + row))
        chosen = x >= _pivot(tl.load(choice + row))
        place = row * VOCABULARY + first + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(values + place, x, mask=chosen)
        tl.store(tokens + place, token, mask=chosen)


@triton.jit
def _above(
    values: tl.tensor, count: tl.tensor, key: tl.tensor, BY_MASS: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """How many (or how much mass) of a list's values are not below the number that orders as `key`: int64."""
    total = tl.zeros([BLOCK], tl.int64)
    for first in range(0, count, BLOCK):
        index = first + tl.arange(0, BLOCK)
        x = tl.load(values + index, mask=index < count, other=float("-inf"))
        above = (_order(x) >= key) & (index < count)
        if BY_MASS:
            total += tl.where(above, _mass(x), 0)
        else:
            total += above.to(tl.int64)
    return tl.sum(total, axis=0)


@triton.jit
def _search(
    values: tl.tensor, count: tl.tensor, low: tl.tensor, goal: tl.tensor, BY_MASS: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """The greatest key from `low` on above which `_above` reaches the goal, as it does for `low`."""
    high = low * 0 + 1  # above that of 0, the greatest value
    while high - low > 1:
        middle = low + (high - low) // 2
        reached = _above(values, count, middle, BY_MASS, BLOCK) >= goal
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    return low


@triton.jit
def _settle_kernel(
    temperature: tl.tensor,
    min_p: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    choice: tl.tensor,
    ends: tl.tensor,
    masses: tl.tensor,
    values: tl.tensor,
    tokens: tl.tensor,
    cut_least: tl.tensor,
    cut_last: tl.tensor,
    VOCABULARY: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    PIVOTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The cut of one row, from its list; grid (R,)."""
    row = tl.program_id(0).to(tl.int64)
    least = tl.log(tl.load(min_p + row))
    last = tl.full([], VOCABULARY, tl.int64)
    if _is_cut(temperature, top_k, top_p, row):
        values += row * VOCABULARY
        tokens += row * VOCABULARY
        count = tl.load(ends + row * CHUNKS + CHUNKS - 1)
        most, share = tl.load(top_k + row), tl.load(top_p + row)
        key = _order(_pivot(tl.load(choice + row)))
        ties = tl.full([], 0, tl.int64)
        if most > 0:
            wanted = tl.minimum(most, count.to(tl.int64))
            key = _search(values, count, key, wanted, False, BLOCK)
            ties = wanted - _above(values, count, key + 1, False, BLOCK)
            mass = _above(values, count, key + 1, True, BLOCK) + ties * _mass(_value(key))
        else:
            index = tl.arange(0, CHUNKS_PADDED)
            everything = masses + (row * PIVOTS + PIVOTS - 1) * CHUNKS + index
            mass = tl.sum(tl.load(everything, mask=index < CHUNKS, other=0), axis=0)
        if share < 1.0:
            goal = _goal(share, mass)
            key = _search(values, count, key, goal, True, BLOCK)
            one = tl.maximum(_mass(_value(key)), 1)
            ties = (goal - _above(values, count, key + 1, True, BLOCK) + one - 1) // one
        if _value(key) >= least:
            least = _value(key)
            last = _tied(values, tokens, count, key, ties, BLOCK)
    tl.store(cut_least + row, least)
    tl.store(cut_last + row, last)


@triton.jit
def _value(key: tl.tensor) -> tl.tensor:
    """The float32 that orders as `key`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _tied(
    values: tl.tensor, tokens: tl.tensor, count: tl.tensor, key: tl.tensor, ties: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """The id of a list's `ties`-th token whose value orders as `key`."""
    before, last = tl.full([], 0, tl.int64), tl.full([], -1, tl.int64)
    for first in range(0, count, BLOCK):
        index = first + tl.arange(0, BLOCK)
        x = tl.load(values + index, mask=index < count, other=float("-inf"))
        tied = (_order(x) == key) & (index < count)
        number = before + tl.cumsum(tied.to(tl.int64), axis=0)
        token = tl.load(tokens + index, mask=tied, other=0).to(tl.int64)
        last = tl.maximum(last, tl.max(tl.where(tied & (number <= ties), token, -1), axis=0))
        before += tl.sum(tied.to(tl.int64), axis=0)
    return last


def find_cuts(
    rows: LogitRows, peaks: Tensor, temperature: Tensor, min_p: Tensor, truncation: Truncation
) -> tuple[Tensor, Tensor]:
    """(least [R] float32, last [R] int64), see above; peaks: of the rows; temperature, min_p [R] float32, contiguous.

    Rows that neither top-k nor top-p cuts cost nothing. Raises `TypeError` or `ValueError` naming the tensor of
    `truncation`; never syncs.
    """
    logits, sizes, device = rows.logits, rows.sizes, rows.logits.device
    top_k, top_p = truncation.top_k.contiguous(), truncation.top_p.contiguous()
    check_parameters(logits, top_k=(top_k, torch.int64), top_p=(top_p, torch.float32))
    count, chunks = rows.grid
    counts = torch.empty(count, _PIVOTS, chunks, dtype=torch.int32, device=device)
    masses = torch.empty(count, _PIVOTS, chunks, dtype=torch.int64, device=device)
    choice = torch.empty(count, dtype=torch.int32, device=device)
    ends, tokens = (torch.empty(count, width, dtype=torch.int32, device=device) for width in (chunks, logits.shape[1]))
    values = torch.empty(logits.shape, device=device)
    least, last = torch.empty(count, device=device), torch.empty(count, dtype=torch.int64, device=device)
    rules, over, whole = (temperature, top_k, top_p), (logits, *rows.tables), {"CHUNKS_PADDED": rows.padded}
    _tally_kernel[rows.grid](
        *over, *rules, peaks, counts, masses, logits.stride(0), PIVOTS=_PIVOTS, **whole, **sizes, num_warps=4, **EXACT
    )
    _choose_kernel[(count,)](
        *rules, counts, masses, choice, ends, CHUNKS=chunks, PIVOTS=_PIVOTS, **whole, num_warps=4, **EXACT
    )
    _gather_kernel[rows.grid](
        *over, *rules, peaks, choice, ends, values, tokens, logits.stride(0), **whole, **sizes, num_warps=4, **EXACT
    )
    _settle_kernel[(count,)](
        temperature, min_p, top_k, top_p, choice, ends, masses, values, tokens, least, last,
        VOCABULARY=logits.shape[1], CHUNKS=chunks, PIVOTS=_PIVOTS, BLOCK=2048, **whole, num_warps=8, **EXACT,
    )  # fmt: skip
    return least, last
