"""From logits to tokens and log-probabilities: vectorised over rows with different parameters.

Letters: R rows (one per token to draw), V vocabulary, C candidates. Everything is float32 (running sums of sorted
masses float64). No row's result depends on another row. Ties are always broken towards the lowest token id. Order of
the rules: penalties, bias, forbidden tokens (`adjust_*`), then temperature, top-k, top-p, min-p (`sample_*`).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .backend import TRITON_BACKENDS, Backend
from .cpu_library import loaded_library
from .distributions import CANDIDATES, best_candidates, full_logits, rank_tokens, scale, truncated_logits
from .noise import gumbel_noise


@dataclass(frozen=True, slots=True)
class RowMasks:
    """What may be drawn in M rows of logits."""

    rows: npt.NDArray[np.int64]
    """[M], ascending."""
    bits: npt.NDArray[np.uint8]
    """[M, at least V / 8]: bit t % 8 of byte t / 8 says whether token t may be. Contiguous, in words of 32 bits."""


_LOGPROB_ROWS = 32
"""Rows ranked at a time for log-probabilities: bounds the sort keys to 32 * V * 8 bytes."""


def survey_rows(logits: Tensor) -> Tensor:
    """[2, R] int64 of [R, V], in one pass over them on the CPU: `greedy_tokens`, and `finite_rows`."""
    rows, vocab = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    # NumPy's memory: what torch takes to allocate is a tenth of a small model's sampling.
    found = np.empty((2, rows), np.int64)
    first = found.__array_interface__["data"][0]
    pointers = (logits.data_ptr(), first, first + rows * found.itemsize)
    loaded_library().survey_rows(*pointers, logits.stride(0), rows, vocab, torch.get_num_threads())
    return torch.from_numpy(found)


def finite_rows(logits: Tensor, backend: Backend = "reference") -> Tensor:
    """[R] int64: whether the maximum of each row of [R, V] is a finite number, so not NaN anywhere, not +inf, not all
    -inf."""
    return survey_rows(logits)[1] if backend == "cpu" else logits.amax(-1).isfinite().long()


def adjust_penalties(
    logits: Tensor, output_counts: Tensor, in_prompt: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> Tensor:
    """Discourage tokens that were seen; returns [R, V] and leaves the arguments alone.

    output_counts [R, V] integer: occurrences in the output; in_prompt [R, V] bool; the strengths are [R] float32.
    repetition (CTRL, Keskar et al. 2019, section 4.1) divides positive and multiplies negative logits of tokens in
    prompt or output; presence is subtracted once, frequency per occurrence, for tokens in the output.
    """
    in_output = output_counts > 0
    factor = torch.where(in_prompt | in_output, repetition[:, None], 1.0)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    return logits - presence[:, None] * in_output - frequency[:, None] * output_counts


def adjust_bias(logits: Tensor, rows: Tensor, tokens: Tensor, bias: Tensor) -> None:
    """Add bias [N] float32 to logits[rows[N], tokens[N]], in place; repeated places add up."""
    logits.index_put_((rows, tokens), bias, accumulate=True)


def forbid(logits: Tensor, rows: Tensor, tokens: Tensor) -> None:
    """Set logits[rows[N], tokens[N]] to -inf, in place."""
    logits.index_put_((rows, tokens), logits.new_full((), float("-inf")))


def unset_bits(bits: Tensor, width: int) -> Tensor:
    """[M, width] bool: whether bit t % 8 of bits[M, t // 8] uint8 is not set."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, :, None] >> places) & 1 == 0).flatten(1)[:, :width]


def forbid_unset(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """Set logits[rows[M], t] to -inf, in place, where bit t % 8 of bits[M, t // 8] uint8 is not set; rows [M] int64 are
    distinct, the bits at least V."""
    width = logits.shape[1]
    if bits.device.type == "cpu":  # a fraction of what torch takes to spread bits
        spread = torch.from_numpy(np.unpackbits(~bits.numpy(), axis=1, count=width, bitorder="little")).view(torch.bool)
    else:
        spread = unset_bits(bits, width)
    if len(rows) == len(logits):  # then they are all of them, in order
        logits.masked_fill_(spread, float("-inf"))
    else:
        logits[rows] = logits[rows].masked_fill_(spread, float("-inf"))


def greedy_tokens(logits: Tensor, backend: Backend = "reference") -> Tensor:
    """[R] int64: the most likely token of each row of [R, V], the lowest id among equals; any token if one is NaN."""
    return survey_rows(logits)[0] if backend == "cpu" else logits.argmax(-1)


def sample_full(
    logits: Tensor,
    temperature: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    backend: Backend = "reference",
) -> Tensor:
    """Draw from the whole distribution, of which min-p may cut the tail: logits [R, V] -> [R] int64.

    temperature, min_p [R] float32, temperature > 0; a token is dropped if its probability is below min_p times the
    largest one. seeds, positions [R] int64 key the noise (see `kernels.noise`). About 20 V operations per row.
    """
    return draw_scaled(full_logits(logits, temperature, min_p, backend), seeds, positions, backend)


def draw_scaled(scaled: Tensor, seeds: Tensor, positions: Tensor, backend: Backend = "reference") -> Tensor:
    """[R] int64, drawn from the softmax of [R, V] by the noise of seeds and positions [R] int64."""
    if backend == "cpu":
        return _draw_cpu(scaled.contiguous(), seeds.contiguous(), positions.contiguous())
    if backend in TRITON_BACKENDS:
        from .sampling_triton import draw_triton  # triton is installed beside a GPU only

        one = scaled.new_ones(len(scaled))
        return draw_triton(scaled, one, one - 1, seeds, positions)
    tokens = torch.arange(scaled.shape[-1], device=scaled.device)
    return gumbel_noise(seeds, positions, tokens).add_(scaled).argmax(-1)


def _draw_cpu(scaled: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """cpu_sampling.cpp; all contiguous."""
    rows, vocab = scaled.shape
    tokens = torch.empty(rows, dtype=torch.int64)
    pointers = (tensor.data_ptr() for tensor in (scaled, seeds, positions, tokens))
    loaded_library().draw_rows(*pointers, rows, vocab, torch.get_num_threads())
    return tokens


def sample_truncated(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    backend: Backend = "reference",
) -> Tensor:
    """Draw from the best tokens only: logits [R, V] -> [R] int64.

    Keeps the top_k [R] int64 most likely tokens (all if < 1), of these the smallest leading set whose renormalised mass
    reaches top_p [R] float32 (the token that crosses it is kept), of these the ones not below min_p [R] times the
    largest probability; the best token always stays. The `CANDIDATES` best tokens settle most rows; only the rows
    they do not settle are sorted in full (one read of a [R] mask by the host).
    """
    if backend == "cpu":
        scaled = truncated_logits(logits, temperature, top_k, top_p, min_p, backend)
        return draw_scaled(scaled, seeds, positions, backend)
    scaled = scale(logits, temperature)
    width = min(CANDIDATES, logits.shape[-1])
    chosen, settled = _sample_candidates(scaled, width, top_k, top_p, min_p, seeds, positions)
    if width < logits.shape[-1] and not bool(settled.all()):
        rest = (~settled).nonzero().squeeze(-1)
        arguments = (top_k[rest], top_p[rest], min_p[rest], seeds[rest], positions[rest])
        chosen[rest] = _sample_candidates(scaled[rest], logits.shape[-1], *arguments)[0]
    return chosen


def _sample_candidates(
    scaled: Tensor, width: int, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens [R] drawn among the `width` best, and whether the kept set lies inside them ([R] bool)."""
    tokens, values, settled = best_candidates(scaled, width, top_k, top_p, min_p)
    noisy = gumbel_noise(seeds, positions, tokens).add_(values)
    return tokens.gather(-1, noisy.argmax(-1, keepdim=True)).squeeze(-1), settled


def token_logprobs(
    logits: Tensor, tokens: Tensor, top: int, backend: Backend = "reference"
) -> tuple[Tensor, Tensor, Tensor]:
    """Natural log-probabilities under softmax(logits): of given tokens, and the most likely ones.

    logits [R, V] float32, tokens [R] int64, top >= 0. Returns chosen [R] float32, ids [R, top] int64 and values
    [R, top] float32, best first. Three passes over the logits, and a selection if top > 0; with Triton one pass.
    """
    if backend in TRITON_BACKENDS:
        from .logprobs_triton import token_logprobs_triton  # triton is installed beside a GPU only

        return token_logprobs_triton(logits, tokens, top)
    norm = torch.logsumexp(logits, dim=-1, keepdim=True)
    chosen = logits.gather(-1, tokens[:, None]).sub_(norm).squeeze(-1)
    width = min(top, logits.shape[-1])
    if width == 0:
        return chosen, tokens.new_empty(len(tokens), 0), logits.new_empty(len(tokens), 0)
    ids = torch.cat([rank_tokens(rows, width) for rows in logits.split(_LOGPROB_ROWS)])
    return chosen, ids, logits.gather(-1, ids).sub_(norm)


def top_logprobs(logits: Tensor, top: int, backend: Backend = "reference") -> tuple[Tensor, Tensor]:
    """Ids [R, top] int64 and natural log-probabilities [R, top] float32 of the most likely tokens, best first.

    The values of `token_logprobs`, but equally likely tokens stand in any order: on a CPU a fifth of its time or less.
    """
    width = min(top, logits.shape[-1])
    if backend in TRITON_BACKENDS:
        from .logprobs_triton import token_logprobs_triton  # triton is installed beside a GPU only

        anything = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        return token_logprobs_triton(logits, anything, width)[1:]
    best = logits.topk(width)
    return best.indices, best.values - logits.logsumexp(-1, keepdim=True)
