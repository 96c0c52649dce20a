"""Log-probabilities in Triton: of given tokens and of the most likely ones, in one pass over the logits.

Contract: that of `kernels.sampling.token_logprobs`; letters as there. Each chunk gives the sum of its exponentials and
its best tokens, picked one after another; a second kernel merges them. A token's place is that of an integer that
holds its logit and, reversed, its id, as in `kernels.distributions.rank_tokens`: ties go to the lowest id.

Roofline, per row: V reads of 4 bytes; `top` comparisons per token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows_triton import EXACT, check_parameters, checked_rows

_MOST = 128
"""Best tokens that the merging program can hold of each chunk."""


@triton.jit
def _key(x: tl.tensor, token: tl.tensor) -> tl.tensor:
    """int64 that compare as logits do, and among equals the other way round than ids."""
    x = tl.where(x == 0.0, 0.0, x)  # there are two zeros, equal as floats only
    bits = x.to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)


@triton.jit(do_not_specialize=["prefix_width", "wanted"])
def _summary_kernel(
    logits: tl.tensor,
    peaks: tl.tensor,
    sums: tl.tensor,
    best: tl.tensor | None,
    stride_row: tl.tensor,
    VOCABULARY: tl.constexpr,
    prefix_width: tl.tensor,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    wanted: tl.tensor,
) -> None:
    """Largest logit, sum of exponentials against it and the keys of the best of one chunk; grid (R, CHUNKS)."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = token < VOCABULARY
    x = tl.load(logits + row * stride_row + token, mask=inside, other=float("-inf"))
    peak = tl.max(x, axis=0)
    place = row * CHUNKS + chunk
    tl.store(peaks + place, peak)
    tl.store(sums + place, tl.sum(tl.where(x > float("-inf"), tl.exp(x - peak), 0.0), axis=0))
    if best is not None:
        keys = tl.where(inside, _key(x, token), -0x8000000000000000)
        for index in range(wanted):
            key = tl.max(keys, axis=0)
            tl.store(best + place * wanted + index, key)
            keys = tl.where(keys == key, -0x8000000000000000, keys)


@triton.jit(do_not_specialize=["wanted"])
def _merge_kernel(
    logits: tl.tensor,
    tokens: tl.tensor,
    peaks: tl.tensor,
    sums: tl.tensor,
    best: tl.tensor | None,
    chosen: tl.tensor,
    ids: tl.tensor,
    values: tl.tensor,
    stride_row: tl.tensor,
    CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    wanted: tl.tensor,
    TOP_PADDED: tl.constexpr,
) -> None:
    """Of one row, from its chunks; grid (R,)."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS_PADDED)
    inside = chunk < CHUNKS
    peak = tl.load(peaks + row * CHUNKS + chunk, mask=inside, other=float("-inf"))
    top = tl.max(peak, axis=0)
    parts = tl.load(sums + row * CHUNKS + chunk, mask=inside, other=0.0)
    norm = top + tl.log(tl.sum(tl.where(peak > float("-inf"), parts * tl.exp(peak - top), 0.0), axis=0))
    tl.store(chosen + row, tl.load(logits + row * stride_row + tl.load(tokens + row)) - norm)
    if best is not None:
        number = tl.arange(0, TOP_PADDED)
        places = (row * CHUNKS + chunk[:, None]) * wanted + number[None, :]
        known = inside[:, None] & (number < wanted)[None, :]
        keys = tl.load(best + places, mask=known, other=-0x8000000000000000)
        for index in range(wanted):
            key = tl.max(tl.max(keys, axis=1), axis=0)
            keys = tl.where(keys == key, -0x8000000000000000, keys)
            bits = (key >> 32).to(tl.int32)
            value = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
            tl.store(ids + row * wanted + index, 0x7FFFFFFF - (key & 0x7FFFFFFF))
            tl.store(values + row * wanted + index, value - norm)


def token_logprobs_triton(logits: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.sampling.token_logprobs` on a GPU: chosen [R], ids and values [R, min(top, V)], top <= 128.

    logits need stride 1 along V only. Raises `TypeError` or `ValueError` naming what is wrong; never syncs.
    """
    rows = checked_rows(logits)
    check_parameters(logits, tokens=(tokens, torch.int64))
    if not 0 <= top <= _MOST:
        raise ValueError(f"top must be between 0 and {_MOST}, got {top}")
    width, (count, chunks) = min(top, logits.shape[1]), rows.grid
    peaks, sums = logits.new_empty(2, count, chunks).unbind()
    chosen, values = logits.new_empty(count), logits.new_empty(count, width)
    ids = torch.empty(count, width, dtype=torch.int64, device=logits.device)
    best = torch.empty(count, chunks, width, dtype=torch.int64, device=logits.device) if width else None
    if count:
        stride = logits.stride(0)
        _summary_kernel[rows.grid](logits, peaks, sums, best, stride, **rows.sizes, wanted=width, num_warps=4, **EXACT)
        _merge_kernel[(count,)](
            logits, tokens.contiguous(), peaks, sums, best, chosen, ids, values, stride, CHUNKS=chunks,
            CHUNKS_PADDED=rows.padded, wanted=width, TOP_PADDED=triton.next_power_of_2(max(1, width)), num_warps=8,
            **EXACT,
        )  # fmt: skip
    return chosen, ids, values
