"""Quest (Tang et al. 2024): each decode step reads only the pages whose keys could matter, and forgets nothing.

A page's least and greatest key per column (`kernels.page_bounds_*`) bound what any of its entries can score:
sum_c max(q_c * least_c, q_c * greatest_c). Letters: S sequences of one new token each, H query heads, K kv heads,
G = H / K, D head dim, B entries of a page, P pages of the pool, M pages of the longest head.
"""

import torch
from torch import Tensor

LEAST_PAGES = 3
DENSE_LAYERS = 2
"""The first layers read everything: their attention is spread too evenly for a selection (the paper, section 4)."""


def select_pages(
    query: Tensor, bounds: Tensor, page_table: Tensor, kept: Tensor, *, budget: int, page_size: int
) -> tuple[Tensor, Tensor]:
    """The page table of a step that reads `budget` entries of each head, or all where it has fewer.

    query [S, H, D], rotated; bounds [P, 2, D] of full pages, of any float type; page_table [S, K, M] int32, columns
    past a head's length arbitrary valid ids; kept [S, K] int32: entries before this step, whose new one is stored
    behind them already. Returns page_table' [S, K, M'] int32, with M' = min(M, max(3, budget / B rounded up)), and
    kept' [S, K] int32, as `kernels.attention.paged_attention` takes them: old pages in their order, all full, then the
    newest. A page counts by its greatest bound over the group's heads. Mutates nothing, never waits for the device.
    """
    columns = page_table.shape[2]
    older = (kept // page_size).long()
    width = min(columns, max(LEAST_PAGES, -(-budget // page_size)))
    scores = page_scores(query, bounds, page_table)
    scores = scores.masked_fill(torch.arange(columns, device=kept.device) >= older[:, :, None], float("-inf"))
    best = scores.topk(width - 1, dim=2)
    chosen = best.indices.masked_fill(best.values == float("-inf"), columns).sort(dim=2).values
    # The newest page follows the last one chosen; what lies behind it repeats it.
    count = older.clamp(max=width - 1)
    places = torch.nn.functional.pad(chosen, (0, 1), value=columns)
    behind = torch.arange(width, device=kept.device) >= count[:, :, None]
    places = torch.where(behind, older[:, :, None], places)
    return page_table.gather(2, places), (count * page_size + kept % page_size).int()


def page_scores(query: Tensor, bounds: Tensor, page_table: Tensor) -> Tensor:
    """[S, K, M] float32: upper bound of q.k on each page, the greatest over the group; arbitrary on empty pages.

    Arguments as of `select_pages`. A positive query column takes the greatest key, a negative one the least: one
    product with both halves side by side.
    """
    sequences, kv_heads = page_table.shape[:2]
    grouped = query.float().view(sequences, kv_heads, -1, query.shape[2])
    halves = torch.cat([grouped.clamp(max=0), grouped.clamp(min=0)], dim=3)
    edges = bounds[page_table.long()].flatten(3).float()
    return (halves @ edges.transpose(2, 3)).amax(2)
