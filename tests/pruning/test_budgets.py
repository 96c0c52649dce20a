"""How budgets divide: totals, safeguards, and each rule against a plain transcription."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.core.pruning import Budget, PruneParams
from quire.pruning.budgets import BUDGETS, Candidates
from quire.pruning.policy import LayerView
from quire.pruning.select import select
from quire.pruning.table import make_policy

from .views import GivenScores, make_view, with_states


def layers_of(lengths: list[list[int]], num_tokens: int, seed: int = 0) -> list[LayerView]:
    return [replace(make_view(heads, num_tokens=num_tokens, seed=seed + i), layer=i) for i, heads in enumerate(lengths)]


def counts_of(
    views: list[LayerView], scores: list[Tensor], target: int, budget: Budget, **more: float | int
) -> list[list[int]]:
    params = PruneParams(policy="x", budget=budget, **({"sinks": 2, "window": 4} | more))  # type: ignore[arg-type]
    return select(GivenScores(*scores), views, params, target).counts.tolist()


def protected_counts(view: LayerView, sinks: int = 2, window: int = 4) -> list[int]:
    return [
        sum(p < sinks or p >= view.num_tokens - window for p in row[:length])
        for row, length in zip(view.positions.tolist(), view.lengths.tolist(), strict=True)
    ]


@settings(max_examples=40)
@given(
    budget=st.sampled_from(["uniform", "pyramid", "prefix", "ada", "global"]),
    lengths=st.integers(1, 3).flatmap(
        lambda heads: st.lists(st.lists(st.integers(1, 60), min_size=heads, max_size=heads), min_size=1, max_size=4)
    ),
    target=st.integers(1, 70),
    seed=st.integers(0, 99),
    sign=st.sampled_from([1.0, -1.0]),
)
def test_totals(budget: Budget, lengths: list[list[int]], target: int, seed: int, sign: float) -> None:
    views = layers_of(lengths, 80, seed)
    scores = [torch.rand(view.valid.shape) * sign for view in views]
    counts = counts_of(views, scores, target, budget)
    always = [protected_counts(view) for view in views]
    for kept, must, have in zip(counts, always, lengths, strict=True):
        assert all(m <= c <= h for c, m, h in zip(kept, must, have, strict=True))
    total, heads = sum(map(sum, counts)), len(lengths) * len(lengths[0])
    assert total <= target * heads + sum(map(sum, always))
    if target >= max(max(row) for row in always):
        assert total <= target * heads
    if budget == "uniform":
        wanted = [
            [min(h, max(target, m)) for h, m in zip(*pair, strict=True)] for pair in zip(lengths, always, strict=True)
        ]
        assert counts == wanted


@pytest.mark.parametrize("budget", ["uniform", "pyramid", "prefix", "ada", "global"])
def test_the_whole_budget_is_used_where_all_heads_are_full(budget: Budget) -> None:
    views = layers_of([[200, 200]] * 4, 200)
    scores = [torch.rand(view.valid.shape) ** (i + 1) for i, view in enumerate(views)]
    assert sum(map(sum, counts_of(views, scores, 130, budget))) == 130 * 8


def test_pyramid_formula() -> None:
    """n = 400, w = 4, mean 160: least 160 / 20, most 320 - 8, evenly from layer to layer."""
    views = layers_of([[400, 400]] * 5, 400)
    scores = [torch.rand(view.valid.shape) for view in views]
    assert counts_of(views, scores, 160, "pyramid") == [[c, c] for c in (312, 236, 160, 84, 8)]
    # Most is bounded by n - w = 396, so the least is 2 * 240 - 396.
    assert counts_of(views, scores, 240, "pyramid") == [[c, c] for c in (396, 318, 240, 162, 84)]


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("window", [1, 4, 16])
def test_a_pyramid_keeps_its_total_from_prune_to_prune(keep: float, window: int) -> None:
    """While the sequence grows the shape changes, to uniform and back: nobody can keep what an earlier one took."""
    params = PruneParams(policy="x", keep=keep, floor=1, window=window, sinks=2, budget="pyramid")
    held = torch.zeros(5, 2, dtype=torch.int64)
    for n in range(13, 500, 13):
        held, target = held + 13, params.target(n)
        entries = Candidates(torch.zeros(5, 2, int(held.max())), held, torch.full_like(held, window + 2), n)
        held = BUDGETS["pyramid"](entries, params, target).clamp(min=window + 2).minimum(held)
        assert int(held.sum()) == target * held.numel()


def test_pyramid_is_uniform_where_the_last_layer_would_lose_its_window() -> None:
    views = layers_of([[400, 400]] * 5, 400)
    scores = [torch.rand(view.valid.shape) for view in views]
    assert counts_of(views, scores, 160, "pyramid", window=7) == [[160, 160]] * 5


def test_ada_formula() -> None:
    """The first 20 % of each head, then the best of all heads."""
    views = layers_of([[50, 50, 50]], 50)
    scores = torch.rand(3, 53)
    scores[1] *= 0.01
    target = 20
    free = [i for i in range(50) if 2 <= i < 46]
    ranked = [[free[i] for i in scores[h, free].argsort(descending=True).tolist()] for h in range(3)]
    safe = {(h, i) for h in range(3) for i in [0, 1, 46, 47, 48, 49, *ranked[h]][: int(0.2 * target)]}
    safe |= {(h, i) for h in range(3) for i in (0, 1, 46, 47, 48, 49)}
    rest = sorted(
        ((h, i) for h in range(3) for i in free if (h, i) not in safe), key=lambda e: -float(scores[e[0], e[1]])
    )
    kept = safe | set(rest[: 3 * target - len(safe)])
    assert counts_of(views, [scores], target, "ada")[0] == [sum(h == k for h, _ in kept) for k in range(3)]
    assert counts_of(views, [scores], target, "ada")[0][1] == 6


def test_ada_safeguard() -> None:
    """A head whose scores are all lower still keeps a fifth of its share."""
    views = layers_of([[200, 200]], 200)
    scores = torch.rand(2, 203)
    scores[0] -= 5
    assert counts_of(views, [scores], 100, "ada") == [[20, 180]]


def test_global_takes_the_best_wherever_they_are() -> None:
    views = layers_of([[50, 50], [50, 50], [30, 30]], 50)
    scores = [torch.rand(view.valid.shape) * factor for view, factor in zip(views, (1.0, 0.01, 0.6), strict=True)]
    free = [
        (float(scores[i][h, e]), i, h)
        for i, view in enumerate(views)
        for h in range(2)
        for e in range(int(view.lengths[h]))
        if 2 <= int(view.positions[h, e]) < 46
    ]
    always = [protected_counts(view) for view in views]
    best = sorted(free, reverse=True)[: 6 * 20 - sum(map(sum, always))]
    expected = [[always[i][h] + sum(b[1:] == (i, h) for b in best) for h in range(2)] for i in range(3)]
    assert counts_of(views, scores, 20, "global") == expected
    assert expected[1] == always[1], "nothing of what scores low everywhere"


def test_prefix_formula() -> None:
    """One threshold for all layers, found here by bisection as in the paper; what always stays is outside."""
    torch.manual_seed(1)
    views = layers_of([[60, 60]] * 3, 60)
    scores = [torch.rand(view.valid.shape) ** power for view, power in zip(views, (1, 4, 12), strict=True)]
    curves = []
    for score in scores:
        heads = score[:, 2:56].sort(descending=True).values
        curves.append((heads / heads.sum(1, keepdim=True)).cumsum(1).mean(0))

    def sizes(threshold: float) -> list[int]:
        return [next((k + 1 for k in range(54) if curve[k] >= threshold), 54) for curve in curves]

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(sizes(middle)) <= 3 * (20 - 6) else (low, middle)
    counts = counts_of(views, scores, 20, "prefix")
    assert counts == [[6 + size] * 2 for size in sizes(low)]
    assert counts[0] > counts[1] > counts[2], "what concentrates needs fewer"


def test_prefix_does_not_depend_on_the_unit_of_negative_scores() -> None:
    views = layers_of([[60, 60]] * 2, 60)
    scores = [-(torch.rand(view.valid.shape) ** power) for view, power in zip(views, (1, 6), strict=True)]
    counts = counts_of(views, scores, 20, "prefix")
    assert counts == counts_of(views, [score * 50 for score in scores], 20, "prefix")
    assert counts[0] != counts[1]


def kept_of(view: LayerView, keep: Tensor, counts: Tensor) -> LayerView:
    """The view after a prune."""
    width = keep.shape[1]
    valid = torch.arange(width) < counts[:, None]
    index = torch.where(valid, keep.long(), 0)
    positions, keys = view.positions.gather(1, index), view.keys.gather(1, index[:, :, None].expand(-1, -1, 8))
    return with_states(view, keys, keys, positions=positions, lengths=counts.long())


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_second_prune_to_the_same_target_takes_nothing(budget: Budget) -> None:
    views = layers_of([[200, 200, 180]] * 3, 200)
    bar = -3.0 if budget == "threshold" else None
    params = PruneParams(policy="knorm", budget=budget, sinks=2, window=4, threshold=bar, floor=1)
    first = select(make_policy(params), views, params, 150)
    assert first.counts.sum() < 3 * 580
    again = [kept_of(view, *pruned) for view, *pruned in zip(views, first.keep, first.counts, strict=True)]
    assert torch.equal(select(make_policy(params), again, params, 150).counts, first.counts)


def test_threshold_lets_through_what_scores_enough() -> None:
    views = layers_of([[50, 50]], 50)
    scores = torch.linspace(0, 1, 53).repeat(2, 1)
    scores[1] -= 10
    counts = counts_of(views, [scores], 7, "threshold", threshold=0.5, floor=9)
    assert counts == [[2 + sum(scores[0, 2:50] >= 0.5), 9]]
