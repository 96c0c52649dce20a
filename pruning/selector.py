"""What a page selector is: in each step it scores the pages of a sequence, and the best are read. It forgets nothing.

Letters: S rows, new tokens that each read pages of their own choice; H query heads, K kv heads, D head dim, B entries
of a page, P pages of the pool, M pages of the longest head.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

LEAST_PAGES = 3
"""That a row reads, however small its budget: the newest and two more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageView:
    """One layer's pages, as a selector sees them. Read only."""

    layer: int
    keys: Tensor
    """[P, B, D] in the cache's type, rotated: those of the whole pool, where they lie."""
    bounds: Tensor | None = None
    """[P, 2, D] of any float type: least and greatest key per column, of full pages; None if it is not needed."""
    page_table: Tensor
    """[S, K, M] int32: the rows' pages in order; columns past a head's length are arbitrary valid ids."""
    kept: Tensor
    """[S, K] int32: entries before the row, whose own is stored behind them already."""

    @property
    def older(self) -> Tensor:
        """[S, K] int64: full pages before the newest one, which is always read."""
        return (self.kept // self.keys.shape[1]).long()


class Selector(Protocol):
    """Scores pages. One instance per sequence, made anew when it gets a slot: it may remember what a layer has read."""

    @property
    def dense_layers(self) -> int:
        """Leading layers in which everything is read."""
        ...

    @property
    def needs_bounds(self) -> bool:
        """Whether `PageView.bounds` must be found."""
        ...

    def scores(self, query: Tensor, pages: PageView) -> Tensor:
        """[S, K, M] float32 for query [S, H, D] (rotated): the higher, the sooner a page is read.

        Arbitrary from `pages.older` on. Mutates nothing, never waits for the device.
        """
        ...


def select_pages(selector: Selector, query: Tensor, pages: PageView, budget: int) -> tuple[Tensor, Tensor]:
    """The page table of rows that read `budget` entries of each head, or all where it has fewer.

    query [S, H, D], rotated. Returns page_table' [S, K, M'] int32, with M' = min(M, max(3, budget / B rounded up)), and
    kept' [S, K] int32, as `kernels.attention.paged_attention` takes them: the best pages in their order, all full, then
    the newest. Mutates nothing, never waits for the device.
    """
    table, older, size = pages.page_table, pages.older, pages.keys.shape[1]
    columns = table.shape[2]
    width = min(columns, max(LEAST_PAGES, -(-budget // size)))
    places = torch.arange(columns, device=table.device)
    scores = selector.scores(query, pages).masked_fill(places >= older[:, :, None], float("-inf"))
    best = scores.topk(width - 1, dim=2)
    chosen = best.indices.masked_fill(best.values == float("-inf"), columns).sort(dim=2).values
    # The newest page follows the last one chosen; what lies behind it repeats it.
    count = older.clamp(max=width - 1)
    chosen = torch.nn.functional.pad(chosen, (0, 1), value=columns)
    chosen = torch.where(places[:width] >= count[:, :, None], older[:, :, None], chosen)
    return table.gather(2, chosen), (count * size + pages.kept % size).int()
