"""What the Triton kernels over rows of logits share: penalties, scaling, noise, the largest logit of each chunk.

Letters: R rows, V vocabulary. A vocabulary is cut into chunks of `BLOCK` tokens, a program each, so that one row fills
a device. Every kernel computes a token's adjusted and scaled logit anew from the model's, in the same operations, so
that all of them see the same number and nothing of the vocabulary's size is written in between.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks_triton import check_contiguous, check_device, check_dtype, check_rows, check_shape

BLOCK = 2048
"""Tokens of a chunk: 75 programs for one row of a large vocabulary."""
EXACT = {"enable_fp_fusion": False}
"""Launch option of every kernel over rows. A compiler that may fuse products with sums does so kernel by kernel: a
number is then rounded once instead of twice, and two kernels no longer see the same one."""


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
    prefix: Tensor | None = None
    """[R, k] int64: tokens that count as output of the row too (drafts before it), -1 for none."""


@triton.jit
def adjusted(
    logits: tl.tensor,
    slots: tl.tensor | None,
    output_counts: tl.tensor | None,
    in_prompt: tl.tensor | None,
    strengths: tl.tensor | None,
    prefix: tl.tensor | None,
    row: tl.tensor,
    token: tl.tensor,
    stride_row: tl.tensor,
    VOCABULARY: tl.constexpr,
    prefix_width: tl.tensor,
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
            if prefix is not None:
                for index in range(prefix_width):
                    count += (token == tl.load(prefix + row * prefix_width + index)).to(tl.int32)
            prompted = tl.load(in_prompt + place, mask=inside, other=0)
            factor = tl.where((count > 0) | (prompted != 0), repetition, 1.0)
            x = tl.where(x > 0, x / factor, x * factor)
            x = x - presence * (count > 0).to(tl.float32)
            x = x - frequency * count.to(tl.float32)
    return x


@triton.jit
def row_peak(peaks: tl.tensor, row: tl.tensor, CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr) -> tl.tensor:
    """The row's largest adjusted logit, from those of its chunks."""
    index = tl.arange(0, CHUNKS_PADDED)
    return tl.max(tl.load(peaks + row * CHUNKS + index, mask=index < CHUNKS, other=float("-inf")), axis=0)


@triton.jit
def scaled(x: tl.tensor, top: tl.tensor, heat: tl.tensor) -> tl.tensor:
    """`kernels.distributions.scale`, given the largest logit and the temperature."""
    return (x - top) / tl.maximum(heat, 1e-30)


@triton.jit
def mix64(x: tl.tensor) -> tl.tensor:
    """SplitMix64's finaliser, as in `kernels.noise`."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def uniform_noise(seed: tl.tensor, position: tl.tensor, token: tl.tensor) -> tl.tensor:
    """`kernels.noise`: (31 bits + 1/2) / 2^31, below one, of one row's tokens."""
    golden = tl.full([], 0x9E3779B97F4A7C15, tl.uint64)
    key = mix64(mix64(seed.to(tl.uint64) + golden) + position.to(tl.uint64) * golden)
    bits = token.to(tl.uint32) * 0x9E3779B9 + (key & 0xFFFFFFFF).to(tl.uint32)
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = bits ^ (key >> 32).to(tl.uint32)
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    bits = bits ^ (bits >> 16)
    uniform = ((bits & 0x7FFFFFFF).to(tl.float32) + 0.5) * 4.656612873077393e-10
    return tl.minimum(uniform, 0.9999999403953552)


@triton.jit
def gumbel_noise(seed: tl.tensor, position: tl.tensor, token: tl.tensor) -> tl.tensor:
    """`kernels.noise.gumbel_noise` of one row's tokens."""
    uniform = uniform_noise(seed, position, token)
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


@triton.jit(do_not_specialize=["prefix_width"])
def _peaks_kernel(
    logits: tl.tensor,
    slots: tl.tensor | None,
    output_counts: tl.tensor | None,
    in_prompt: tl.tensor | None,
    strengths: tl.tensor | None,
    prefix: tl.tensor | None,
    peaks: tl.tensor,
    stride_row: tl.tensor,
    VOCABULARY: tl.constexpr,
    prefix_width: tl.tensor,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The largest adjusted logit of one chunk of one row; grid (R, CHUNKS)."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * BLOCK + tl.arange(0, BLOCK)
    x = adjusted(
        logits, slots, output_counts, in_prompt, strengths, prefix, row, token, stride_row, VOCABULARY, prefix_width
    )
    tl.store(peaks + row * CHUNKS + chunk, tl.max(tl.where(x == x, x, float("-inf")), axis=0))


@dataclass(frozen=True, slots=True)
class LogitRows:
    """Rows of logits, checked and ready for launches."""

    logits: Tensor
    tables: tuple[Tensor | None, ...]
    """The kernels' slots, output_counts, in_prompt, strengths, prefix."""
    sizes: dict[str, int]
    """The kernels' VOCABULARY, prefix_width, CHUNKS and BLOCK."""

    @property
    def grid(self) -> tuple[int, int]:
        """A program for each chunk of each row."""
        return len(self.logits), self.sizes["CHUNKS"]

    @property
    def padded(self) -> int:
        """CHUNKS_PADDED: chunks that a program which reads all of them takes."""
        return triton.next_power_of_2(self.sizes["CHUNKS"])

    def peaks(self) -> Tensor:
        """[R, chunks] float32: the largest adjusted logits."""
        peaks = self.logits.new_empty(self.grid)
        _peaks_kernel[self.grid](
            self.logits, *self.tables, peaks, self.logits.stride(0), **self.sizes, num_warps=4, **EXACT
        )
        return peaks


def checked_rows(logits: Tensor, penalties: Penalties | None = None) -> LogitRows:
    """The rows of logits [R, V]; raises `TypeError` or `ValueError` naming the tensor."""
    check_shape("logits", logits, (None, None))
    check_dtype("logits", logits, torch.float32)
    check_rows("logits", logits)
    vocabulary = logits.shape[1]
    if vocabulary < 1:
        raise ValueError("logits must have at least one column")
    width = 0 if penalties is None or penalties.prefix is None else penalties.prefix.shape[1]
    sizes = {"VOCABULARY": vocabulary, "prefix_width": width, "CHUNKS": triton.cdiv(vocabulary, BLOCK), "BLOCK": BLOCK}
    return LogitRows(logits, _checked_tables(penalties, logits), sizes)


def check_parameters(logits: Tensor, **parameters: tuple[Tensor, torch.dtype]) -> None:
    """Raise unless each is [R] of its type, on the device of logits [R, V]."""
    for name, (tensor, dtype) in parameters.items():
        check_shape(name, tensor, (len(logits),))
        check_dtype(name, tensor, dtype)
        check_device(logits.device, **{name: tensor})


def _checked_tables(penalties: Penalties | None, logits: Tensor) -> tuple[Tensor | None, ...]:
    if penalties is None:
        return None, None, None, None, None
    rows, vocabulary = logits.shape
    p = penalties
    for name, tensor, shape, dtype in (
        ("slots", p.slots, (rows,), torch.int64),
        ("output_counts", p.output_counts, (None, vocabulary), torch.int32),
        ("in_prompt", p.in_prompt, (None, vocabulary), torch.bool),
        ("strengths", p.strengths, (rows, 3), torch.float32),
        ("prefix", p.prefix, (rows, None), torch.int64),
    ):
        if tensor is None:
            continue
        check_shape(name, tensor, shape)
        check_dtype(name, tensor, dtype)
        check_contiguous(name, tensor)
        check_device(logits.device, **{name: tensor})
    return p.slots, p.output_counts, p.in_prompt, p.strengths, p.prefix
