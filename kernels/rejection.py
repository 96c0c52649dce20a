"""Draft tokens that were drawn from a distribution: accepted or replaced so that the target's own comes out.

The rule of speculative sampling (Leviathan et al. 2023, "Fast inference from transformers via speculative decoding",
appendix A.1; Chen et al. 2023). Letters: R rows, V vocabulary. Distributions are given as `kernels.distributions`
makes them, scaled logits whose greatest is 0. Randomness is keyed by (seed, position) as in `kernels.noise`, on streams
of its own, so what the draft drew, whether it is accepted and what replaces it are independent.

Bytes: 4 R V of each side's distributions once to judge, and once more in the rows where a draft token was rejected.
"""

import torch
from torch import Tensor

from .backend import TRITON_BACKENDS, Backend
from .cpu_library import loaded_library
from .noise import ACCEPT_STREAM, DRAFT_STREAM, stream, uniforms
from .sampling import draw_scaled


def draw_drafts(scaled: Tensor, seeds: Tensor, positions: Tensor, backend: Backend = "reference") -> Tensor:
    """Draft tokens [R] int64 drawn from the softmax of scaled [R, V]; seeds, positions [R] int64."""
    return draw_scaled(scaled, seeds, stream(positions, DRAFT_STREAM), backend)


def judge_drafts(
    scaled: Tensor,
    drafts: Tensor,
    draft_scaled: Tensor,
    heads: Tensor,
    seeds: Tensor,
    positions: Tensor,
    backend: Backend = "reference",
) -> Tensor:
    """[R] int64, distributed as p, the softmax of scaled [R, V], where `drafts` [R] int64 were drawn from q, that of
    draft_scaled [R, V].

    The draft token x with probability min(1, p(x) / q(x)), else one of norm(max(p - q, 0)), which is never x; from p
    where nothing is left of that but rounding, and where q makes no sense. heads [R] int64: the first row of the run of
    consecutive rows that a row belongs to; after a rejection in a run nothing is drawn, and what stands there means
    nothing: -1, or a draft token. seeds, positions [R] int64. But for our own kernels, the host reads how many rows are
    to be drawn.
    """
    if backend == "cpu":
        return _judge_cpu(scaled, drafts, draft_scaled, heads, seeds, positions)
    if backend in TRITON_BACKENDS:
        from .rejection_triton import judge_drafts_triton  # triton is installed beside a GPU only

        return judge_drafts_triton(scaled, drafts, draft_scaled, heads, seeds, positions)
    of_p, of_q = _probabilities(scaled, drafts), _probabilities(draft_scaled, drafts)
    accepted = (uniforms(seeds, stream(positions, ACCEPT_STREAM)) * of_q < of_p) & (of_q > 0)
    rejected = (~accepted).long()
    before = rejected.cumsum(0) - rejected
    first = (~accepted & (before == before[heads])).nonzero().squeeze(1)
    p, q = scaled[first].softmax(-1), draft_scaled[first].softmax(-1).nan_to_num_(0.0)
    residual = (p - q).clamp_(min=0)
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)
    tokens = torch.where(accepted, drafts, -1)
    tokens[first] = draw_scaled(residual.log_(), seeds[first], positions[first])
    return tokens


def _judge_cpu(
    scaled: Tensor, drafts: Tensor, draft_scaled: Tensor, heads: Tensor, seeds: Tensor, positions: Tensor
) -> Tensor:
    """cpu_rejection.cpp"""
    rows, vocab = scaled.shape
    tokens = torch.empty(rows, dtype=torch.int64)
    decide = stream(positions, ACCEPT_STREAM)
    arguments = [part.contiguous() for part in (scaled, draft_scaled, drafts, heads, seeds, decide, positions)]
    pointers = (tensor.data_ptr() for tensor in (*arguments, tokens))
    loaded_library().judge_rows(*pointers, rows, vocab, torch.get_num_threads())
    return tokens


def _probabilities(scaled: Tensor, tokens: Tensor) -> Tensor:
    """[R]: of tokens [R] under the softmax of scaled [R, V], whose greatest is 0."""
    return scaled.gather(1, tokens[:, None]).squeeze(1).exp_().div_(scaled.exp().sum(-1))
