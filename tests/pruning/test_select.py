"""What selection promises whatever the policy says."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.core.errors import InvalidRequestError
from quire.core.pruning import PruneParams
from quire.kernels.compaction_reference import compact_kv
from quire.pruning.policy import LayerView
from quire.pruning.select import Selection, select
from quire.pruning.table import POLICIES, make_policy, policy_infos

from .views import GivenScores, make_view


def kept_sets(selection: Selection) -> list[list[set[int]]]:
    """[layer][head] -> kept indices."""
    return [
        [set(row[:count].tolist()) for row, count in zip(keep, counts.tolist(), strict=True)]
        for keep, counts in zip(selection.keep, selection.counts, strict=True)
    ]


def best(scores: Tensor, view: LayerView, head: int, params: PruneParams, count: int) -> set[int]:
    """The same by a plain loop: what is always kept, then the best scores; ties to the older."""
    length, n = int(view.lengths[head]), view.num_tokens
    positions = view.positions[head].tolist()
    stays = [i for i in range(length) if positions[i] < params.sinks or positions[i] >= n - params.window]
    others = sorted(set(range(length)) - set(stays), key=lambda i: (-float(scores[head, i]), i))
    return set(stays) | set(others[: max(0, count - len(stays))])


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    target=st.integers(1, 50),
    sinks=st.integers(0, 5),
    window=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_uniform_keeps_the_best_of_each_head(
    lengths: list[int], target: int, sinks: int, window: int, seed: int
) -> None:
    views = [replace(make_view(lengths, num_tokens=60, seed=seed + i), layer=i) for i in range(2)]
    scores = [torch.randn(view.valid.shape) for view in views]
    params = PruneParams(policy="x", sinks=sinks, window=window)
    selection = select(GivenScores(*scores), views, params, target)
    assert selection.keep.dtype == selection.counts.dtype == torch.int32
    for layer, heads in enumerate(kept_sets(selection)):
        for head, kept in enumerate(heads):
            assert kept == best(scores[layer], views[layer], head, params, target)
    for keep, count in zip(selection.keep.flatten(0, 1), selection.counts.flatten(), strict=True):
        assert (keep[:count].diff() > 0).all()


def test_non_finite_scores_never_harm() -> None:
    view = make_view([20], num_tokens=20)
    scores = torch.arange(23.0)[None]
    scores[0, 5:10] = float("nan")
    scores[0, 10], scores[0, 11] = float("inf"), float("-inf")
    kept = kept_sets(select(GivenScores(scores), [view], PruneParams(policy="x", sinks=1, window=2), 14))[0][0]
    assert kept == {0, 18, 19, 10, *range(12, 18), 1, 2, 3, 4}


def test_compaction_takes_a_selection_as_it_is() -> None:
    """Pages of 4 entries; what a head keeps, and nothing else, ends in its new pages in order."""
    view = make_view([18, 11], num_tokens=30)
    selection = select(GivenScores(torch.rand(2, 21)), [view], PruneParams(policy="x", sinks=1, window=2), 7)
    pool, positions = torch.zeros(20, 2, 4, 8), torch.zeros(20, 4, dtype=torch.int32)
    sources, targets = (
        torch.arange(12, dtype=torch.int32).view(2, 6),
        torch.arange(12, 16, dtype=torch.int32).view(2, 2),
    )
    for head, length in enumerate((18, 11)):
        for e in range(length):
            page, offset = int(sources[head, e // 4]), e % 4
            pool[page, 0, offset], pool[page, 1, offset] = view.keys[head, e], view.values[head, e]
            positions[page, offset] = view.positions[head, e]
    keep, counts = selection.keep.flatten(0, 1), selection.counts.flatten()
    compact_kv(pool, positions, sources, targets, keep, counts, in_place=False)
    for head in range(2):
        kept = keep[head, :7].long()
        assert torch.equal(positions[targets[head].long()].flatten()[:7], view.positions[head, kept])
        assert torch.equal(pool[targets[head].long(), 0].flatten(0, 1)[:7], view.keys[head, kept])


def test_no_layer_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        select(GivenScores(), [], PruneParams(policy="x"), 3)


def test_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequestError, match=r"'magic'; known: window, knorm") as error:
        make_policy(PruneParams(policy="magic"))
    assert error.value.param == "prune.policy"
    assert set(policy_infos()) >= set(POLICIES)
