"""Which entries rank best: the C++ kernels against plain torch, number by number, ties included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.kernels.backend import Backend
from quire.kernels.cpu_library import cpu_library
from quire.kernels.paged_rows import PagedRows
from quire.kernels.ranking import ScoredLayer, best_entries, rank_entries, share_best

pytestmark = pytest.mark.skipif(cpu_library() is None, reason="no compiler")

BACKENDS: tuple[Backend, Backend] = ("cpu", "reference")


def few_values(shape: tuple[int, ...], seed: int, levels: int) -> Tensor:
    """Scores with many ties, zeros of both signs and both infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-levels, levels + 1, shape, generator=generator) / 3
    scores[torch.rand(shape, generator=generator) < 0.2] *= -1.0
    return scores.masked_fill(scores >= levels / 3, float("inf")).masked_fill(scores <= -levels / 3, float("-inf"))


SCORES = st.builds(
    few_values,
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 50)),
    st.integers(0, 1000),
    st.sampled_from([1, 3, 50, 10**6]),
)


@settings(max_examples=200, deadline=None)
@given(scores=SCORES, data=st.data())
def test_best_entries(scores: Tensor, data: st.DataObject) -> None:
    scores = scores.flatten(0, 1)
    rows, entries = scores.shape
    counts = torch.tensor(data.draw(st.lists(st.integers(1, entries), min_size=rows, max_size=rows)))
    found, expected = (best_entries(scores, counts, backend) for backend in BACKENDS)
    assert found.shape == expected.shape and found.dtype == expected.dtype == torch.int32
    for row, count in enumerate(counts.tolist()):
        assert torch.equal(found[row, :count], expected[row, :count])
        order = sorted(range(entries), key=lambda e: (-float(scores[row, e]), e))
        assert found[row, :count].tolist() == sorted(order[:count])


@settings(max_examples=200, deadline=None)
@given(scores=SCORES, wanted=st.integers(1, 500))
def test_shares_of_the_best(scores: Tensor, wanted: int) -> None:
    found, expected = (share_best(scores, wanted, backend) for backend in BACKENDS)
    assert torch.equal(found, expected)
    for group, shares in zip(scores, found.tolist(), strict=True):
        every = [(-float(x), row) for row, part in enumerate(group) for x in part if x > float("-inf")]
        best = [row for _, row in sorted(every)[:wanted]]
        assert shares == [best.count(row) for row in range(len(group))]


@settings(max_examples=100, deadline=None)
@given(scores=SCORES, sinks=st.integers(0, 5), newest=st.integers(0, 200), data=st.data())
def test_ranks(scores: Tensor, sinks: int, newest: int, data: st.DataObject) -> None:
    _, heads, entries = scores.shape
    scores[..., ::7] = float("nan")
    given_layers, longest = [], 0
    for layer in scores:
        width = data.draw(st.integers(1, entries))
        lengths = torch.tensor(data.draw(st.lists(st.integers(0, width), min_size=heads, max_size=heads)))
        positions = PagedRows(
            torch.arange(entries, dtype=torch.int32).view(-1, 1) * 3,
            torch.arange(entries)[None].int().expand(heads, -1),
            width,
        )
        given_layers.append(ScoredLayer(layer[:, :width], positions, lengths))
        longest = max(longest, width)
    found = rank_entries(given_layers, sinks=sinks, newest=newest, backend="cpu")
    expected = rank_entries(given_layers, sinks=sinks, newest=newest)
    assert all(torch.equal(part, known) for part, known in zip(found, expected, strict=True))
    ranked, lengths, kept = found
    assert torch.equal(lengths, torch.stack([layer.lengths for layer in given_layers]))
    assert torch.equal((ranked == float("inf")).sum(-1), kept)
    assert torch.equal((ranked == float("-inf")).sum(-1), longest - lengths)
