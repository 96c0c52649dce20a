"""Drawing tokens in Triton: penalties, temperature, cuts of the distribution, Gumbel noise and argmax, fused.

Contract: that of `kernels.sampling`; letters as there. The tokens are those of `adjust_penalties`, then of
`greedy_tokens` (temperature 0), `sample_full` or `sample_truncated`: the noise has the bits of `kernels.noise`, and
every step rounds as there, but for logarithms, quotients and masses, where a compiler's are a few units in the last
place (2e-6 in all) away. So a token may differ only where two candidates, or the mass up to a token and the mass asked
for, are that close.

Work, with `kernels.rows_triton`: the first kernel finds each chunk's largest adjusted logit, `kernels.cuts_triton`
where rows are cut, the next the chunk's winner, the last the row's. Nothing waits for the device.

Roofline, per row: 2 V reads of 4 bytes, with penalties 2 V of 9 (count and prompt flag beside the logit); of a cut row
once more the chunks that hold candidates, and in the last pass only those. Some 40 integer and 30 float operations per
token of a drawn row, 11 M for V = 152,000: 256 such rows are 311 MB and 2.7 G operations, some 0.1 ms each on a Hopper
GPU, where plain torch makes about 20 passes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cuts_triton import Truncation, find_cuts
from .rows_triton import EXACT, Penalties, adjusted, check_parameters, checked_rows, gumbel_noise, row_peak, scaled


@triton.jit
def kept(x: tl.tensor, token: tl.tensor, least: tl.tensor, last: tl.tensor) -> tl.tensor:
    """Which scaled logits a row's cut keeps, see `kernels.cuts_triton`."""
    return (x > least) | ((x == least) & (token <= last))


@triton.jit(do_not_specialize=["prefix_width"])
def _draw_kernel(
    logits: tl.tensor,
    slots: tl.tensor | None,
    output_counts: tl.tensor | None,
    in_prompt: tl.tensor | None,
    strengths: tl.tensor | None,
    prefix: tl.tensor | None,
    temperature: tl.tensor,
    min_p: tl.tensor,
    seeds: tl.tensor,
    positions: tl.tensor,
    peaks: tl.tensor,
    cut_least: tl.tensor | None,
    cut_last: tl.tensor | None,
    best: tl.tensor,
    winners: tl.tensor,
    stride_row: tl.tensor,
    VOCABULARY: tl.constexpr,
    prefix_width: tl.tensor,
    CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The winner of one chunk of one row: the largest of logit (greedy) or scaled logit + noise; grid (R, CHUNKS)."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = row * CHUNKS + chunk
    heat, top = tl.load(temperature + row), row_peak(peaks, row, CHUNKS, CHUNKS_PADDED)
    if cut_least is not None:
        least, last = tl.load(cut_least + row), tl.load(cut_last + row)
    else:
        least, last = tl.log(tl.load(min_p + row)), tl.full([], VOCABULARY, tl.int64)
    # A cut leaves most chunks nothing: their peak tells, and no logit is read.
    if (heat > 0.0) & (scaled(tl.load(peaks + place), top, heat) < least):
        tl.store(best + place, float("-inf"))
        tl.store(winners + place, chunk * BLOCK)
        return
    token = chunk * BLOCK + tl.arange(0, BLOCK)
    x = adjusted(
        logits, slots, output_counts, in_prompt, strengths, prefix, row, token, stride_row, VOCABULARY, prefix_width
    )
    if heat > 0.0:
        x = scaled(x, top, heat)
        noisy = gumbel_noise(tl.load(seeds + row), tl.load(positions + row), token) + x
        x = tl.where(kept(x, token, least, last) & (token < VOCABULARY), noisy, float("-inf"))
    x = tl.where(x == x, x, float("-inf"))
    value, index = tl.max(x, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best + place, value)
    tl.store(winners + place, chunk * BLOCK + index)


@triton.jit
def _pick_kernel(
    best: tl.tensor, winners: tl.tensor, tokens: tl.tensor, CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr
) -> None:
    """The winner of one row, the lowest id among equals; grid (R,)."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, CHUNKS_PADDED)
    values = tl.load(best + row * CHUNKS + index, mask=index < CHUNKS, other=float("-inf"))
    _, place = tl.max(values, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(tokens + row, tl.load(winners + row * CHUNKS + place).to(tl.int64))


@triton.jit(do_not_specialize=["prefix_width"])
def _process_kernel(
    logits: tl.tensor,
    temperature: tl.tensor,
    peaks: tl.tensor,
    cut_least: tl.tensor,
    cut_last: tl.tensor,
    processed: tl.tensor,
    stride_row: tl.tensor,
    VOCABULARY: tl.constexpr,
    prefix_width: tl.tensor,
    CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Scaled logits of one chunk of one row, -inf where the cut drops them; grid (R, CHUNKS)."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * BLOCK + tl.arange(0, BLOCK)
    x = adjusted(logits, None, None, None, None, None, row, token, stride_row, VOCABULARY, prefix_width)
    x = scaled(x, row_peak(peaks, row, CHUNKS, CHUNKS_PADDED), tl.load(temperature + row))
    stays = kept(x, token, tl.load(cut_least + row), tl.load(cut_last + row)) | (x != x)
    tl.store(processed + row * VOCABULARY + token, tl.where(stays, x, float("-inf")), mask=token < VOCABULARY)


def draw_triton(
    logits: Tensor,
    temperature: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    penalties: Penalties | None = None,
    truncation: Truncation | None = None,
) -> Tensor:
    """One token of each row's distribution: [R] int64. Mutates nothing, never syncs.

    logits [R, V] float32, stride 1 along V; temperature [R] float32 (0: the most likely token, the lowest id among
    equals), min_p [R] float32, seeds and positions [R] int64 as in `kernels.sampling.sample_full`; truncation: that of
    each row, None: no row has one. A row that is not finite gives some token of the vocabulary. Raises `TypeError` or
    `ValueError` naming the tensor.
    """
    rows = checked_rows(logits, penalties)
    check_parameters(
        logits, temperature=(temperature, torch.float32), min_p=(min_p, torch.float32),
        seeds=(seeds, torch.int64), positions=(positions, torch.int64),
    )  # fmt: skip
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    if not len(logits):
        return tokens
    temperature, min_p = temperature.contiguous(), min_p.contiguous()
    peaks, best = rows.peaks(), logits.new_empty(rows.grid)
    winners = torch.empty(rows.grid, dtype=torch.int32, device=logits.device)
    cuts = (None, None) if truncation is None else find_cuts(rows, peaks, temperature, min_p, truncation)
    _draw_kernel[rows.grid](
        logits, *rows.tables, temperature, min_p, seeds.contiguous(), positions.contiguous(), peaks, *cuts,
        best, winners, logits.stride(0), CHUNKS_PADDED=rows.padded, **rows.sizes, num_warps=4, **EXACT,
    )  # fmt: skip
    _pick_kernel[(len(tokens),)](
        best, winners, tokens, CHUNKS=best.shape[1], CHUNKS_PADDED=rows.padded, num_warps=1, **EXACT
    )
    return tokens


def processed_logits_triton(logits: Tensor, temperature: Tensor, min_p: Tensor, truncation: Truncation) -> Tensor:
    """`kernels.distributions.truncated_logits` (or `full_logits`, for rows that nothing truncates): [R, V] float32.

    Arguments as of `draw_triton`, temperature > 0; reads the logits two to four times, writes them once, never syncs.
    """
    rows = checked_rows(logits)
    check_parameters(logits, temperature=(temperature, torch.float32), min_p=(min_p, torch.float32))
    processed = torch.empty(logits.shape, device=logits.device)
    if len(logits):
        temperature, peaks = temperature.contiguous(), rows.peaks()
        cuts = find_cuts(rows, peaks, temperature, min_p.contiguous(), truncation)
        _process_kernel[rows.grid](
            logits, temperature, peaks, *cuts, processed, logits.stride(0), CHUNKS_PADDED=rows.padded, **rows.sizes,
            num_warps=4, **EXACT,
        )  # fmt: skip
    return processed
