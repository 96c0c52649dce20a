"""Log-probabilities of a few tokens of each row, without a whole row's log-softmax in memory.

A loss on K of V tokens sends back, for each row, softmax times one number, and K entries more. Written so, both passes
go over the logits once, a block of rows at a time that fits the cache, in whichever type the head computed them: on one
core that takes half the time of a step of a small draft off what autograd makes of gather and logsumexp.
"""

from typing import Any

import torch
from torch import Tensor

BLOCK = 2**17
"""Logits at once; half a megabyte in float32."""


class _Picked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> Tensor:
        blocks = logits.split(max(1, BLOCK // logits.shape[1]))
        total = torch.cat([block.float().logsumexp(1, keepdim=True) for block in blocks])
        ctx.save_for_backward(logits, ids, total)
        return logits.gather(1, ids).float() - total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, ids, total = ctx.saved_tensors
        (grad,) = grads
        found, rows = torch.empty_like(logits), max(1, BLOCK // logits.shape[1])
        parts = (part.split(rows) for part in (found, logits, ids, total, grad, grad.sum(1, keepdim=True)))
        for out, block, places, log_total, entries, share in zip(*parts, strict=True):
            softmax = (block - log_total).exp_()
            out.copy_(softmax.mul_(-share).scatter_add_(1, places, entries))
        return found, None


def picked_log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities [N, K] float32 of the tokens ids [N, K] int64; logits [N, V] of any floating-point type.

    A token named twice in a row is counted twice.
    """
    picked: Tensor = _Picked.apply(logits, ids)
    return picked
