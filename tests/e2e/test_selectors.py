"""Whoever scores pages can be asked for: one class in the table, and the engine reads what it picks."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from quire.pruning import table
from quire.pruning.selector import PageView

from .test_pruning_matrix import Serving, params, prompt, save


class NewestSelector:
    """The newest pages, from the second layer on."""

    dense_layers = 1
    needs_bounds = False

    def scores(self, query: Tensor, pages: PageView) -> Tensor:
        assert pages.bounds is None
        return torch.arange(pages.page_table.shape[2]).float().expand(pages.page_table.shape)


@pytest.mark.parametrize("beside", [None, "quest", "knorm"])
def test_a_selector_in_the_table_reads_what_it_picks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: str | None
) -> None:
    monkeypatch.setitem(table.SELECTORS, "newest", NewestSelector)
    serving = Serving(save(tmp_path))
    assert serving.loop.engine.info.policies["newest"].selects
    serving.submit("a", prompt(61), params("newest", keep=0.2, floor=8), max_tokens=20)
    if beside is not None:
        serving.submit("b", prompt(50, 1), params(beside, keep=0.2, floor=8), max_tokens=20)
    serving.run()
    serving.check()
    passed = serving.recorder.lives["a", 0][0].passed_over
    assert {layer for layer, _, _ in passed} == {1, 2} and {query for *_, query in passed} == set(range(61, 80))
    for (_, _, query), positions in passed.items():
        pages = -(-max(8, (query + 1) // 5) // 4)
        assert positions == set(range((query // 4 - pages + 1) * 4)), "all but the newest pages of 4"
