"""Accepting and replacing draft tokens in Triton; see `kernels.rejection`, whose contract and letters these are.

Results are the reference's but where two numbers that decide (u * q(x) and p(x), or two noisy candidates) are within
rounding of another. Unlike there, the host waits for nothing: rows that need no token of their own end at once.

Roofline, per row: V reads of 4 bytes of p and of q; a row that is replaced reads both once more, some 50 operations
per token. Writes nothing of the vocabulary's size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks_triton import check_contiguous, check_device, check_dtype, check_shape
from .noise import ACCEPT_STREAM
from .rows_triton import EXACT, check_parameters, checked_rows, gumbel_noise, uniform_noise


@triton.jit(do_not_specialize=["prefix_width"])
def _sums_kernel(
    p: tl.tensor,
    q: tl.tensor,
    sums: tl.tensor,
    stride_row: tl.tensor,
    VOCABULARY: tl.constexpr,
    prefix_width: tl.tensor,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """What the exponentials of one chunk of one row of p and q sum to; grid (R, CHUNKS)."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = token < VOCABULARY
    place = (row * CHUNKS + chunk) * 2
    x = tl.load(p + row * stride_row + token, mask=inside, other=float("-inf"))
    tl.store(sums + place, tl.sum(tl.exp(x), axis=0))
    x = tl.load(q + row * VOCABULARY + token, mask=inside, other=float("-inf"))
    tl.store(sums + place + 1, tl.sum(tl.exp(x), axis=0))


@triton.jit
def _accept_kernel(
    p: tl.tensor,
    q: tl.tensor,
    drafts: tl.tensor,
    seeds: tl.tensor,
    positions: tl.tensor,
    sums: tl.tensor,
    totals: tl.tensor,
    rejected: tl.tensor,
    stride_row: tl.tensor,
    VOCABULARY: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    OFFSET: tl.constexpr,
) -> None:
    """Whether one row rejects its draft token; grid (R,)."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS_PADDED)
    places = (row * CHUNKS + chunk) * 2
    total_p = tl.sum(tl.load(sums + places, mask=chunk < CHUNKS, other=0.0), axis=0)
    total_q = tl.sum(tl.load(sums + places + 1, mask=chunk < CHUNKS, other=0.0), axis=0)
    draft = tl.load(drafts + row)
    of_p = tl.exp(tl.load(p + row * stride_row + draft)) / total_p
    of_q = tl.exp(tl.load(q + row * VOCABULARY + draft)) / total_q
    u = uniform_noise(tl.load(seeds + row), tl.load(positions + row) + OFFSET, tl.full([], 0, tl.int32))
    tl.store(rejected + row, tl.where((u * of_q < of_p) & (of_q > 0.0), 0, 1))
    tl.store(totals + row * 2, total_p)
    tl.store(totals + row * 2 + 1, total_q)


@triton.jit
def _ends(rejected: tl.tensor, heads: tl.tensor, row: tl.tensor) -> tl.tensor:
    """0: the row accepts; 1: it is the first of its run to reject; more: one before it has."""
    count = tl.load(rejected + row)
    if count > 0:
        for before in range(tl.load(heads + row), row):
            count += tl.load(rejected + before)
    return count


@triton.jit(do_not_specialize=["prefix_width"])
def _replace_kernel(
    p: tl.tensor,
    q: tl.tensor,
    heads: tl.tensor,
    seeds: tl.tensor,
    positions: tl.tensor,
    totals: tl.tensor,
    rejected: tl.tensor,
    best: tl.tensor,
    winners: tl.tensor,
    stride_row: tl.tensor,
    VOCABULARY: tl.constexpr,
    prefix_width: tl.tensor,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One chunk's winners of one row, by what p has more than q and by p itself; grid (R, CHUNKS)."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if _ends(rejected, heads, row) == 1:
        token = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = token < VOCABULARY
        x = tl.load(p + row * stride_row + token, mask=inside, other=float("-inf"))
        y = tl.load(q + row * VOCABULARY + token, mask=inside, other=float("-inf"))
        of_p = tl.exp(x) / tl.load(totals + row * 2)
        of_q = tl.exp(y) / tl.load(totals + row * 2 + 1)
        more = of_p - tl.where(of_q == of_q, of_q, 0.0)
        noise = gumbel_noise(tl.load(seeds + row), tl.load(positions + row), token)
        rest = tl.where(more > 0.0, tl.log(tl.maximum(more, 1e-45)) + noise, float("-inf"))
        value, place = tl.max(rest, axis=0, return_indices=True, return_indices_tie_break_left=True)
        at = row * 2 * CHUNKS + chunk
        tl.store(best + at, value)
        tl.store(winners + at, chunk * BLOCK + place)
        whole = tl.where(of_p > 0.0, x + noise, float("-inf"))
        value, place = tl.max(whole, axis=0, return_indices=True, return_indices_tie_break_left=True)
        tl.store(best + at + CHUNKS, value)
        tl.store(winners + at + CHUNKS, chunk * BLOCK + place)


@triton.jit
def _settle_kernel(
    drafts: tl.tensor,
    heads: tl.tensor,
    rejected: tl.tensor,
    best: tl.tensor,
    winners: tl.tensor,
    tokens: tl.tensor,
    CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
) -> None:
    """The token of one row; grid (R,)."""
    row = tl.program_id(0).to(tl.int64)
    ends = _ends(rejected, heads, row)
    token = tl.where(ends == 0, tl.load(drafts + row), -1)
    if ends == 1:
        index = tl.arange(0, CHUNKS_PADDED)
        first = row * 2 * CHUNKS
        values = tl.load(best + first + index, mask=index < CHUNKS, other=float("-inf"))
        if tl.max(values, axis=0) == float("-inf"):
            first += CHUNKS
            values = tl.load(best + first + index, mask=index < CHUNKS, other=float("-inf"))
        _, place = tl.max(values, axis=0, return_indices=True, return_indices_tie_break_left=True)
        token = tl.load(winners + first + place).to(tl.int64)
    tl.store(tokens + row, token)


def judge_drafts_triton(
    processed: Tensor, drafts: Tensor, draft_processed: Tensor, heads: Tensor, seeds: Tensor, positions: Tensor
) -> Tensor:
    """`kernels.rejection.judge_drafts` on a GPU: [R] int64; runs are of few rows.

    processed needs stride 1 along V only, draft_processed is contiguous. Raises `TypeError` or `ValueError` naming the
    tensor; never syncs.
    """
    rows = checked_rows(processed)
    check_shape("draft_processed", draft_processed, tuple(processed.shape))
    check_dtype("draft_processed", draft_processed, torch.float32)
    check_contiguous("draft_processed", draft_processed)
    check_device(processed.device, draft_processed=draft_processed)
    numbers = {"drafts": drafts, "heads": heads, "seeds": seeds, "positions": positions}
    check_parameters(processed, **{name: (tensor, torch.int64) for name, tensor in numbers.items()})
    drafts, heads, seeds, positions = (tensor.contiguous() for tensor in numbers.values())
    count, chunks = rows.grid
    tokens, rejected = torch.empty_like(drafts), torch.empty(count, dtype=torch.int32, device=drafts.device)
    if not count:
        return tokens
    sums, totals = processed.new_empty(count, chunks, 2), processed.new_empty(count, 2)
    best, winners = processed.new_empty(count, 2, chunks), rejected.new_empty(count, 2, chunks)
    both, stride = (processed, draft_processed), processed.stride(0)
    padded = {"CHUNKS": chunks, "CHUNKS_PADDED": rows.padded}
    _sums_kernel[rows.grid](*both, sums, stride, **rows.sizes, num_warps=4, **EXACT)
    _accept_kernel[(count,)](
        *both, drafts, seeds, positions, sums, totals, rejected, stride, VOCABULARY=processed.shape[1],
        OFFSET=ACCEPT_STREAM << 40, **padded, num_warps=1, **EXACT,
    )  # fmt: skip
    _replace_kernel[rows.grid](
        *both, heads, seeds, positions, totals, rejected, best, winners, stride, **rows.sizes, num_warps=4, **EXACT
    )
    _settle_kernel[(count,)](drafts, heads, rejected, best, winners, tokens, **padded, num_warps=1, **EXACT)
    return tokens
