"""Draft tokens that were drawn from a distribution: accepted or replaced so that the target's own comes out.

The rule of speculative sampling (Leviathan et al. 2023, "Fast inference from transformers via speculative decoding",
appendix A.1; Chen et al. 2023). Letters: R rows, V vocabulary. Randomness is keyed by (seed, position) as in
`kernels.noise`, on streams of its own, so what the draft drew, whether it is accepted and what replaces it are
independent.
"""

import torch
from torch import Tensor

from .noise import ACCEPT_STREAM, DRAFT_STREAM, stream, uniforms
from .sampling import draw_scaled


def draw_drafts(scaled: Tensor, seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Draft tokens [R] int64 drawn from q, the softmax of scaled [R, V], and q [R, V] float32.

    scaled: as of `kernels.distributions`; seeds, positions [R] int64. Where the draft's logits make no sense q is 0,
    which rejects the token.
    """
    return draw_scaled(scaled, seeds, stream(positions, DRAFT_STREAM)), scaled.softmax(-1).nan_to_num_(0.0)


def judge_drafts(scaled: Tensor, drafts: Tensor, q: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """[R] int64, distributed as p, the softmax of scaled [R, V], if `drafts` [R] int64 are what q [R, V] was drawn to.

    The draft token x with probability min(1, p(x) / q(x)), else one of norm(max(p - q, 0)), which is never x; from p
    where nothing is left of that but rounding. Seeds, positions [R] int64.
    """
    p = scaled.softmax(-1)
    of_p, of_q = (table.gather(1, drafts[:, None]).squeeze(1) for table in (p, q))
    accepted = (uniforms(seeds, stream(positions, ACCEPT_STREAM)) * of_q < of_p) & (of_q > 0)
    residual = (p - q).clamp_(min=0)
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)
    return torch.where(accepted, drafts, draw_scaled(residual.log_(), seeds, positions))
