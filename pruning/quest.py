"""Quest (Tang et al. 2024): each decode step reads only the pages whose keys could matter, and forgets nothing.

A page's least and greatest key per column (`kernels.page_bounds_*`) bound what any of its entries can score:
sum_c max(q_c * least_c, q_c * greatest_c). A page counts by its greatest bound over the group's heads.
"""

import torch
from torch import Tensor

from .selector import PageView


class QuestSelector:
    """Pages by the upper bound of q.k on them."""

    dense_layers = 2
    """Their attention is spread too evenly for a selection (the paper, section 4)."""
    needs_bounds = True

    def scores(self, query: Tensor, pages: PageView) -> Tensor:
        """See `Selector.scores`.

        A positive query column takes the greatest key, a negative one the least: one product with both halves side by
        side.
        """
        assert pages.bounds is not None
        rows, kv_heads = pages.page_table.shape[:2]
        grouped = query.float().view(rows, kv_heads, -1, query.shape[2])
        halves = torch.cat([grouped.clamp(max=0), grouped.clamp(min=0)], dim=3)
        edges = pages.bounds[pages.page_table.long()].flatten(3).float()
        return (halves @ edges.transpose(2, 3)).amax(2)
