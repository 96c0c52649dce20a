"""The refinements against plain transcriptions."""

from dataclasses import replace

import pytest
import torch

from quire.core.pruning import PruneParams
from quire.pruning.policy import Limits
from quire.pruning.refine import CHUNK, ChunkPolicy, ValueNormPolicy, projected_norms
from quire.pruning.select import select
from quire.pruning.table import make_policy

from .test_select import kept_sets
from .views import GivenScores, make_view


def test_projected_norm() -> None:
    view = make_view([9, 5], num_tokens=9, output_weight=torch.randn(11, 6 * 8))
    assert view.output_weight is not None
    norms = projected_norms(view)
    for head, entry in ((0, 0), (0, 8), (1, 4)):
        parts = [
            view.output_weight[:, h * 8 : h * 8 + 8] @ view.values[head, entry] for h in range(3 * head, 3 * head + 3)
        ]
        expected = sum(float(part.abs().sum()) for part in parts) / 3
        assert norms[head, entry] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("negative", [False, True])
def test_value_norm_takes_half_by_score_and_the_rest_weighed(negative: bool) -> None:
    view = make_view([40, 40], num_tokens=40, output_weight=torch.randn(11, 2 * 8))
    scores = torch.rand(2, 43)
    params = PruneParams(policy="x", sinks=1, window=3)
    given = scores - 2 if negative else scores
    kept = kept_sets(select(ValueNormPolicy(GivenScores(given)), [view], params, 20))[0]
    norms = projected_norms(view)
    masses = scores
    if negative:
        masses = (
            (given - given[:, :40].mean(1, keepdim=True)) / given[:, :40].std(1, correction=0, keepdim=True)
        ).exp()
        masses = masses / masses[:, :40].sum(1, keepdim=True)
    for head in range(2):
        always = [0, 37, 38, 39]
        ranked = [i for i in scores[head, :40].argsort(descending=True).tolist() if i not in always]
        first = always + ranked[: 10 - 4]
        weighed = (masses[head] + 1e-4) * norms[head]
        second = [i for i in weighed[:40].argsort(descending=True).tolist() if i not in first][:10]
        assert kept[head] == {*first, *second}


def test_chunks_stay_whole() -> None:
    view = make_view([8 * CHUNK, 8 * CHUNK], num_tokens=8 * CHUNK)
    scores = torch.rand(2, 8 * CHUNK + 3)
    kept = kept_sets(
        select(ChunkPolicy(GivenScores(scores)), [view], PruneParams(policy="x", sinks=CHUNK, window=CHUNK), 5 * CHUNK)
    )[0]
    means = [float(scores[:, c * CHUNK : (c + 1) * CHUNK].mean()) for c in range(8)]
    chunks = {0, 7, *sorted(range(1, 7), key=lambda c: -means[c])[:3]}
    assert kept[0] == kept[1] == {c * CHUNK + i for c in chunks for i in range(CHUNK)}


def test_chunks_are_of_positions_not_of_slots() -> None:
    """After a prune neighbours in the cache may be far apart in the text."""
    view = make_view([30, 17], num_tokens=6 * CHUNK)
    scores = torch.rand(2, 33)
    means = ChunkPolicy(GivenScores(scores)).scores(view, Limits(0, 1, 8))
    together: dict[int, list[float]] = {}
    for head, length in ((0, 30), (1, 17)):
        for e in range(length):
            together.setdefault(int(view.positions[head, e]) // CHUNK, []).append(float(scores[head, e]))
    for head, length in ((0, 30), (1, 17)):
        for e in range(length):
            chunk = together[int(view.positions[head, e]) // CHUNK]
            assert means[head, e] == pytest.approx(sum(chunk) / len(chunk), rel=1e-5)


def test_needs_are_those_of_all() -> None:
    policy = make_policy(PruneParams(policy="snapkv", refine=("chunk", "value-norm")))
    assert policy.needs.queries and policy.needs.output_weight
    assert isinstance(policy, ChunkPolicy) and isinstance(policy.inner, ValueNormPolicy)
    assert not make_policy(PruneParams(policy="snapkv", refine=("chunk",))).needs.output_weight


def test_both_together_give_finite_scores() -> None:
    view = replace(make_view([40, 12], num_tokens=64), output_weight=torch.randn(11, 4 * 8))
    scores = ChunkPolicy(ValueNormPolicy(GivenScores(torch.rand(2, 43)))).scores(view, Limits(1, 3, 20))
    assert scores[view.valid].isfinite().all()
