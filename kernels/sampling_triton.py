"""Drawing from whole distributions in Triton: penalties, temperature, min-p, Gumbel noise and argmax, fused.

Contract: that of `kernels.sampling`; letters as there. The tokens are those of `adjust_penalties`, then of
`greedy_tokens` (temperature 0) or `sample_full`: the noise has the bits of `kernels.noise`, and every step rounds as
there, but for logarithms and quotients, where a compiler's are a few units in the last place (2e-6 in all) away. So a
token may differ only where two candidates are that close.

Work: a vocabulary is cut into chunks, a program each. The first kernel finds each chunk's largest adjusted logit, the
second, which needs the row's, the chunk's winner, the third the row's. Nothing of the vocabulary's size is written.

Roofline, per row: 2 V reads of 4 bytes, with penalties 2 V of 9 (count and prompt flag beside the logit); some 40
integer and 30 float operations per token of a drawn row, 11 M for V = 152,000. 256 such rows are 311 MB and 2.7 G
operations, some 0.1 ms each on a Hopper GPU, where plain torch makes about 20 passes. Rows cut by top-k
or top-p stay with torch (`sample_truncated`): an exact cut needs the head of the row selected and sorted.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks_triton import check_contiguous, check_device, check_dtype, check_rows, check_shape

_BLOCK = 2048
"""Tokens of a chunk: 75 programs for one row of a large vocabulary."""


@dataclass(frozen=True, slots=True)
class Penalties:
    """Tables of N slots, and whose they are; see `kernels.sampling.adjust_penalties`."""

    slots: Tensor
    """[R] int64: each row's slot."""
    output_counts: Tensor
    """[N, V] int32."""
    in_prompt: Tensor
    """[N, V] bool."""
    strengths: Tensor
    """[R, 3] float32: repetition, presence, frequency; with (1, 0, 0) the slot's tables are not even read."""


@triton.jit
def _adjusted(
    logits: tl.tensor,
    slots: tl.tensor | None,
    output_counts: tl.tensor | None,
    in_prompt: tl.tensor | None,
    strengths: tl.tensor | None,
    row: tl.tensor,
    token: tl.tensor,
    stride_row: tl.tensor,
    VOCABULARY: tl.constexpr,
) -> tl.tensor:
    """The row's logits of some tokens after penalties, -inf past the vocabulary."""
    inside = token < VOCABULARY
    x = tl.load(logits + row * stride_row + token, mask=inside, other=float("-inf"))
    if slots is not None:
        repetition = tl.load(strengths + row * 3)
        presence = tl.load(strengths + row * 3 + 1)
        frequency = tl.load(strengths + row * 3 + 2)
        if (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0):
            place = tl.load(slots + row) * VOCABULARY + token
            count = tl.load(output_counts + place, mask=inside, other=0)
            prompted = tl.load(in_prompt + place, mask=inside, other=0)
            factor = tl.where((count > 0) | (prompted != 0), repetition, 1.0)
            x = tl.where(x > 0, x / factor, x * factor)
            x = x - presence * (count > 0).to(tl.float32)
            x = x - frequency * count.to(tl.float32)
    return x


@triton.jit
def _mix64(x: tl.tensor) -> tl.tensor:
    """SplitMix64's finaliser, as in `kernels.noise`."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _gumbel(seed: tl.tensor, position: tl.tensor, token: tl.tensor) -> tl.tensor:
    """`kernels.noise.gumbel_noise` of one row's tokens."""
    golden = tl.full([], 0x9E3779B97F4A7C15, tl.uint64)
    key = _mix64(_mix64(seed.to(tl.uint64) + golden) + position.to(tl.uint64) * golden)
    bits = token.to(tl.uint32) * 0x9E3779B9 + (key & 0xFFFFFFFF).to(tl.uint32)
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = bits ^ (key >> 32).to(tl.uint32)
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    bits = bits ^ (bits >> 16)
    uniform = ((bits & 0x7FFFFFFF).to(tl.float32) + 0.5) * 4.656612873077393e-10
    uniform = tl.minimum(uniform, 0.9999999403953552)
    # -log(1 - u) = 2 atanh(u / (2 - u)): near 0, where the largest noise comes from, a logarithm of 1 - u has no digits
    # left. Up to u = 1/2 the ninth term is below float32's last digit.
    s = uniform / (2.0 - uniform)
    z = s * s
    series = z * (1.0 / 15.0) + 1.0 / 13.0
    series = series * z + 1.0 / 11.0
    series = series * z + 1.0 / 9.0
    series = series * z + 1.0 / 7.0
    series = series * z + 0.2
    series = series * z + 1.0 / 3.0
    series = 2.0 * s * (series * z + 1.0)
    exponential = tl.where(uniform <= 0.5, series, -tl.log(1.0 - uniform))
    return -tl.log(exponential)


@triton.jit
def _peaks_kernel(
    logits: tl.tensor,
    slots: tl.tensor | None,
    output_counts: tl.tensor | None,
    in_prompt: tl.tensor | None,
    strengths: tl.tensor | None,
    peaks: tl.tensor,
    stride_row: tl.tensor,
    VOCABULARY: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The largest adjusted logit of one chunk of one row; grid (R, CHUNKS)."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * BLOCK + tl.arange(0, BLOCK)
    x = _adjusted(logits, slots, output_counts, in_prompt, strengths, row, token, stride_row, VOCABULARY)
    tl.store(peaks + row * CHUNKS + chunk, tl.max(tl.where(x == x, x, float("-inf")), axis=0))


@triton.jit
def _draw_kernel(
    logits: tl.tensor,
    slots: tl.tensor | None,
    output_counts: tl.tensor | None,
    in_prompt: tl.tensor | None,
    strengths: tl.tensor | None,
    temperature: tl.tensor,
    min_p: tl.tensor,
    seeds: tl.tensor,
    positions: tl.tensor,
    peaks: tl.tensor,
    best: tl.tensor,
    winners: tl.tensor,
    stride_row: tl.tensor,
    VOCABULARY: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The winner of one chunk of one row: the largest of logit (greedy) or scaled logit + noise; grid (R, CHUNKS)."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * BLOCK + tl.arange(0, BLOCK)
    x = _adjusted(logits, slots, output_counts, in_prompt, strengths, row, token, stride_row, VOCABULARY)
    heat = tl.load(temperature + row)
    if heat > 0.0:
        index = tl.arange(0, CHUNKS_PADDED)
        top = tl.max(tl.load(peaks + row * CHUNKS + index, mask=index < CHUNKS, other=float("-inf")), axis=0)
        x = (x - top) / tl.maximum(heat, 1e-30)
        least = tl.log(tl.load(min_p + row))
        noisy = _gumbel(tl.load(seeds + row), tl.load(positions + row), token) + x
        x = tl.where((x < least) | (token >= VOCABULARY), float("-inf"), noisy)
    x = tl.where(x == x, x, float("-inf"))
    value, place = tl.max(x, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best + row * CHUNKS + chunk, value)
    tl.store(winners + row * CHUNKS + chunk, chunk * BLOCK + place)


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


def draw_triton(
    logits: Tensor,
    temperature: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    penalties: Penalties | None = None,
) -> Tensor:
    """One token of each row's whole distribution: [R] int64. Mutates nothing, never syncs.

    logits [R, V] float32, stride 1 along V; temperature [R] float32 (0: the most likely token, the lowest id among
    equals), min_p [R] float32, seeds and positions [R] int64 as in `kernels.sampling.sample_full`. A row that is not
    finite gives some token of the vocabulary. Raises `TypeError` or `ValueError` naming the tensor.
    """
    _check(logits, temperature, min_p, seeds, positions)
    tables = _checked_tables(penalties, logits)
    rows, vocabulary = logits.shape
    chunks = triton.cdiv(vocabulary, _BLOCK)
    padded = triton.next_power_of_2(chunks)
    peaks, best = logits.new_empty(2, rows, chunks).unbind()
    winners = torch.empty(rows, chunks, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        sizes = {"VOCABULARY": vocabulary, "CHUNKS": chunks, "BLOCK": _BLOCK, "num_warps": 4}
        grid = (rows, chunks)
        _peaks_kernel[grid](logits, *tables, peaks, logits.stride(0), **sizes)
        _draw_kernel[grid](
            logits, *tables, temperature.contiguous(), min_p.contiguous(), seeds.contiguous(), positions.contiguous(),
            peaks, best, winners, logits.stride(0), CHUNKS_PADDED=padded, **sizes,
        )  # fmt: skip
        _pick_kernel[(rows,)](best, winners, tokens, CHUNKS=chunks, CHUNKS_PADDED=padded, num_warps=1)
    return tokens


def _check(logits: Tensor, temperature: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor) -> None:
    check_shape("logits", logits, (None, None))
    check_dtype("logits", logits, torch.float32)
    check_rows("logits", logits)
    if logits.shape[1] < 1:
        raise ValueError("logits must have at least one column")
    for name, tensor, dtype in (
        ("temperature", temperature, torch.float32),
        ("min_p", min_p, torch.float32),
        ("seeds", seeds, torch.int64),
        ("positions", positions, torch.int64),
    ):
        check_shape(name, tensor, (len(logits),))
        check_dtype(name, tensor, dtype)
    check_device(logits.device, temperature=temperature, min_p=min_p, seeds=seeds, positions=positions)


def _checked_tables(penalties: Penalties | None, logits: Tensor) -> tuple[Tensor | None, ...]:
    """The kernels' arguments: slots, output_counts, in_prompt, strengths."""
    if penalties is None:
        return None, None, None, None
    rows, vocabulary = logits.shape
    p = penalties
    for name, tensor, shape, dtype in (
        ("slots", p.slots, (rows,), torch.int64),
        ("output_counts", p.output_counts, (None, vocabulary), torch.int32),
        ("in_prompt", p.in_prompt, (None, vocabulary), torch.bool),
        ("strengths", p.strengths, (rows, 3), torch.float32),
    ):
        check_shape(name, tensor, shape)
        check_dtype(name, tensor, dtype)
        check_contiguous(name, tensor)
        check_device(logits.device, **{name: tensor})
    return p.slots, p.output_counts, p.in_prompt, p.strengths
