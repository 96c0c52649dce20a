"""Bounds of the keys on each page: plain torch, the reference for `kernels.page_bounds_triton`.

A page's summary bounds what any of its entries can score, so that whole pages can be passed over (Quest, Tang et al.
2024). Letters: N pages asked for, P pages of the pool, B entries of a page, D head dim.
"""

import torch
from torch import Tensor


def page_key_bounds(bounds: Tensor, pool: Tensor, pages: Tensor, counts: Tensor) -> None:
    """bounds[p] becomes least and greatest key per column among the first counts entries of each page p of `pages`.

    bounds [P, 2, D] of pool's type, contiguous, mutated: least at [:, 0], greatest at [:, 1]; pool [P, 2, B, D],
    contiguous; pages [N] int32, all different; counts [N] int32: 0 .. B entries that the page holds. An empty page gets
    (inf, -inf), which bounds nothing.
    """
    keys = pool[pages.long(), 0]
    missing = (torch.arange(pool.shape[2], device=pool.device) >= counts[:, None])[:, :, None]
    bounds[pages.long(), 0] = keys.masked_fill(missing, float("inf")).amin(1)
    bounds[pages.long(), 1] = keys.masked_fill(missing, float("-inf")).amax(1)
