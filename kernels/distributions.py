"""The distributions that tokens are drawn from: logits after temperature, top-k, top-p and min-p.

What `kernels.sampling` draws from, and what the exact rule for draft tokens compares (`kernels.rejection`). Letters: R
rows, V vocabulary. Everything is float32 (running sums of sorted masses float64); no row's result depends on another.

Bytes: 8 R V, logits in and scaled ones out; the kernels find top-k and top-p cuts in rows that are still cached.
"""

import torch
from torch import Tensor

from .backend import TRITON_BACKENDS, Backend
from .cpu_library import loaded_library

CANDIDATES = 1024
"""Sorted candidates looked at before a full sort of the vocabulary; a sort costs ten times as much."""
MIN_TEMPERATURE = 1e-30
"""Smaller ones would be zero or denormal in float32; the result is the argmax either way."""


def rank_tokens(scores: Tensor, width: int) -> Tensor:
    """[R, width] int64: the highest of scores [R, V] float32, best first, ties by token id.

    Sorts integer keys that hold score and token, so that the result is the same whatever algorithm sorts.
    """
    vocab = scores.shape[-1]
    bits = (scores + 0.0).view(torch.int32)  # there are two zeros, equal as floats only
    ordered = bits ^ ((bits >> 31) & (2**31 - 1))  # compares like the float it came from
    reverse_id = torch.arange(vocab - 1, -1, -1, device=scores.device)
    keys = (ordered.long() << 32) | reverse_id
    best = keys.topk(width).values if width < vocab else keys.sort(dim=-1, descending=True).values
    return (vocab - 1) - (best & (2**32 - 1))


def scale(logits: Tensor, temperature: Tensor) -> Tensor:
    """(logits - their maximum) / temperature: at most 0, no overflow at any temperature."""
    return (logits - logits.amax(-1, keepdim=True)).div_(temperature.clamp(min=MIN_TEMPERATURE)[:, None])


def full_logits(logits: Tensor, temperature: Tensor, min_p: Tensor, backend: Backend = "reference") -> Tensor:
    """[R, V], at most 0: `sample_full` draws from their softmax. Tokens that min-p drops are -inf."""
    if backend == "cpu":
        rows = len(logits)
        return _shaped_cpu(logits, temperature, torch.zeros(rows, dtype=torch.int64), torch.ones(rows), min_p)
    scaled = scale(logits, temperature)
    return scaled.masked_fill_(scaled < min_p.log()[:, None], float("-inf"))


def truncated_logits(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, backend: Backend = "reference"
) -> Tensor:
    """[R, V], at most 0: `sample_truncated` draws from their softmax. Tokens that it drops are -inf.

    Arguments as there; but for our own kernels, the host reads a [R] mask if V is more than `CANDIDATES`.
    """
    if backend == "cpu":
        return _shaped_cpu(logits, temperature, top_k, top_p, min_p)
    if backend in TRITON_BACKENDS:
        from .cuts_triton import Truncation  # triton is installed beside a GPU only
        from .sampling_triton import processed_logits_triton

        return processed_logits_triton(logits, temperature, min_p, Truncation(top_k, top_p))
    scaled = scale(logits, temperature)
    width = min(CANDIDATES, logits.shape[-1])
    tokens, values, settled = best_candidates(scaled, width, top_k, top_p, min_p)
    result = torch.full_like(scaled, float("-inf")).scatter_(1, tokens, values)
    if width < logits.shape[-1] and not bool(settled.all()):
        rest = (~settled).nonzero().squeeze(-1)
        cuts = (top_k[rest], top_p[rest], min_p[rest])
        tokens, values, _ = best_candidates(scaled[rest], logits.shape[-1], *cuts)
        result[rest] = torch.empty_like(values).scatter_(1, tokens, values)
    return result


def _shaped_cpu(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """cpu_distributions.cpp: the same distributions; a row that is not finite becomes NaN."""
    rows, vocab = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    # Contiguous, and alive until the call returns.
    cuts = (
        temperature.clamp(min=MIN_TEMPERATURE),
        top_k.contiguous(),
        top_p.contiguous(),
        min_p.log(),
    )
    scaled = torch.empty((rows, vocab))
    pointers = (logits.data_ptr(), scaled.data_ptr(), *(cut.data_ptr() for cut in cuts))
    loaded_library().shape_rows(*pointers, logits.stride(0), rows, vocab, torch.get_num_threads())
    return scaled


def best_candidates(
    scaled: Tensor, width: int, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The `width` best tokens [R, width] of scaled logits [R, V], best first, their logits, -inf if they are dropped,
    and whether all that are kept are among them ([R] bool); top_k, top_p, min_p as `sample_truncated` takes them.
    """
    tokens = rank_tokens(scaled, width)
    values = scaled.gather(-1, tokens)
    rank = torch.arange(width, device=scaled.device)
    limited = top_k > 0
    in_k = (rank < top_k[:, None]) | ~limited[:, None]
    mass = values.exp().mul_(in_k)
    total = torch.where(limited, mass.sum(-1, dtype=torch.float64), scaled.exp().sum(-1, dtype=torch.float64))
    reached = mass.cumsum(-1, dtype=torch.float64)
    goal = (top_p.double() * total)[:, None]
    before_crossing = torch.roll(reached, 1, dims=-1) < goal
    kept = in_k & (before_crossing | (top_p >= 1)[:, None]) & (values >= min_p.log()[:, None])
    kept[:, 0] = True
    inside_k = limited & (top_k <= width)
    inside_p = ~limited & (top_p < 1) & (reached[:, -1] >= goal[:, 0])
    return tokens, values.masked_fill_(~kept, float("-inf")), inside_k | inside_p
