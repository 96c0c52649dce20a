"""Page selection: bounds that bound, tables that attention can use, and everything where the budget allows it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.kernels.attention import paged_attention
from quire.kernels.page_bounds_reference import page_key_bounds
from quire.pruning.quest import QuestSelector
from quire.pruning.selector import LEAST_PAGES, PageView, select_pages

PAGE, DIM, KV_HEADS, GROUP = 4, 8, 2, 3


class Cache:
    """Random pages of sequences whose heads hold `lengths` [S, K] entries, the step's new one included."""

    def __init__(self, lengths: list[list[int]], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.total = torch.tensor(lengths, dtype=torch.int32)
        self.columns = -(-int(self.total.max()) // PAGE) + 1
        count = self.total.numel() * self.columns
        self.pool = torch.randn(count, 2, PAGE, DIM, generator=generator)
        shape = (*self.total.shape, self.columns)
        self.table = torch.randperm(count, generator=generator).int().view(shape)
        self.positions = torch.zeros(count, PAGE, dtype=torch.int32)
        self.bounds = torch.zeros(count, 2, DIM)
        for row in self.table.flatten(0, 1):
            self.positions[row.long()] = torch.arange(self.columns * PAGE, dtype=torch.int32).view(-1, PAGE)
        fill = (self.total[..., None] - torch.arange(self.columns) * PAGE).clamp(0, PAGE)
        page_key_bounds(self.bounds, self.pool, self.table.flatten(), fill.flatten().int())
        self.query = torch.randn(len(lengths), KV_HEADS * GROUP, DIM, generator=generator) * 2

    def view(self, dtype: torch.dtype = torch.float32) -> PageView:
        bounds, keys = self.bounds.to(dtype), self.pool[:, 0].to(dtype)
        return PageView(layer=2, keys=keys, bounds=bounds, page_table=self.table, kept=self.total - 1)

    def select(self, budget: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        return select_pages(QuestSelector(), self.query.to(dtype), self.view(dtype), budget)

    def attend(self, table: Tensor, kept: Tensor) -> Tensor:
        count = len(self.total)
        starts = torch.arange(count + 1, dtype=torch.int32)
        return paged_attention(
            self.query, self.pool, self.positions, table, kept, starts, (1,) * count,
            torch.full((count,), 10**6), max_kept=int(kept.max()) + 1, value_dim=DIM, scale=DIM**-0.5,
        )  # fmt: skip


LENGTHS = st.lists(st.lists(st.integers(1, 40), min_size=KV_HEADS, max_size=KV_HEADS), min_size=1, max_size=3)


@settings(max_examples=25)
@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_everything_is_read_where_the_budget_allows_it(lengths: list[list[int]], seed: int) -> None:
    cache = Cache(lengths, seed)
    table, kept = cache.select(cache.columns * PAGE)
    assert torch.equal(kept, cache.total - 1)
    torch.testing.assert_close(cache.attend(table, kept), cache.attend(cache.table, cache.total - 1))


@settings(max_examples=25)
@given(lengths=LENGTHS, seed=st.integers(0, 99), budget=st.integers(1, 48))
def test_the_best_pages_in_their_order_and_the_newest_last(lengths: list[list[int]], seed: int, budget: int) -> None:
    cache = Cache(lengths, seed)
    table, kept = cache.select(budget)
    assert table.dtype == kept.dtype == torch.int32
    pages = max(LEAST_PAGES, -(-budget // PAGE))
    assert table.shape[2] == min(cache.columns, pages)
    for s, row in enumerate(lengths):
        for k, total in enumerate(row):
            newest = (total - 1) // PAGE
            bounds = []
            for page in cache.table[s, k, :newest].tolist():
                heads = cache.query[s, k * GROUP : (k + 1) * GROUP, None]
                least, greatest = cache.bounds[page]
                bounds.append(float(torch.maximum(heads * least, heads * greatest).sum(-1).max()))
            best = sorted(torch.tensor(bounds).argsort(descending=True)[: pages - 1].tolist())
            expected = [*(int(cache.table[s, k, i]) for i in best), int(cache.table[s, k, newest])]
            assert table[s, k, : len(expected)].tolist() == expected
            assert int(kept[s, k]) + 1 == len(best) * PAGE + total - newest * PAGE


def test_scores_bound_every_product() -> None:
    cache = Cache([[40, 17]])
    scores = QuestSelector().scores(cache.query, cache.view())
    for k, total in enumerate((40, 17)):
        for column in range(-(-total // PAGE)):
            keys = cache.pool[int(cache.table[0, k, column]), 0, : total - column * PAGE]
            products = cache.query[0, k * GROUP : (k + 1) * GROUP] @ keys.T
            assert products.max() <= scores[0, k, column] + 1e-4


def test_a_needle_is_found() -> None:
    """A page that draws nearly all attention is read, so the result stays as it was."""
    cache = Cache([[40, 40]])
    for k in range(KV_HEADS):
        page = int(cache.table[0, k, 4])
        cache.query[0, k * GROUP : (k + 1) * GROUP] = cache.query[0, k * GROUP]
        cache.pool[page, 0, 1] = cache.query[0, k * GROUP] * 8
        page_key_bounds(
            cache.bounds, cache.pool, torch.tensor([page], dtype=torch.int32), torch.tensor([PAGE], dtype=torch.int32)
        )
    full = cache.attend(cache.table, cache.total - 1)
    torch.testing.assert_close(cache.attend(*cache.select(12)), full, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bounds_in_the_caches_type(dtype: torch.dtype) -> None:
    cache = Cache([[40, 33]])
    table, kept = cache.select(16)
    halved = cache.select(16, dtype)
    assert halved[0].shape == table.shape and torch.equal(halved[1], kept)
