"""What policies compute over a layer's entries: the C++ kernels against plain torch."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from quire.kernels.attention_columns import attention_columns, attention_columns_reference
from quire.kernels.cpu_library import cpu_library
from quire.kernels.expected_logits import expected_logits, expected_logits_reference, mean_probabilities
from quire.kernels.key_scores import entry_norms, mean_cosines, mean_cosines_reference
from quire.kernels.lag_ranks import lag_ranks, lag_ranks_reference
from quire.kernels.paged_rows import PagedRows
from quire.kernels.query_moments import add_moments, moments_of
from quire.kernels.token_means import mean_by_neighbours, mean_by_token

pytestmark = pytest.mark.skipif(cpu_library() is None, reason="no compiler")

DTYPES = [torch.float32, torch.bfloat16]


SIZES = [4, 16, 48]
"""Entries of a page: several pages to a run, one, and pages that runs of the kernels do not divide."""


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def in_pages(states: Tensor, size: int, lengths: list[int]) -> PagedRows:
    """States [K, E, ...] in pages that lie anywhere in half of a pool, NaN wherever no entry is."""
    heads, entries, *width = states.shape
    columns = -(-entries // size)
    table = torch.randperm(heads * columns + 3, generator=torch.Generator().manual_seed(entries))
    table = table[: heads * columns].view(heads, columns).int()
    nothing = float("nan") if states.is_floating_point() else -1
    pool = torch.full((heads * columns + 3, 2, size, *width), nothing, dtype=states.dtype)
    for head, length in enumerate(lengths):
        for entry in range(length):
            pool[table[head, entry // size], 1, entry % size] = states[head, entry]
    return PagedRows(pool[:, 1], table, entries)


def assert_same(found: Tensor, expected: Tensor, lengths: list[int], atol: float = 1e-5, rtol: float = 1e-4) -> None:
    for head, length in enumerate(lengths):
        torch.testing.assert_close(found[head, :length], expected[head, :length], atol=atol, rtol=rtol)


def test_what_lies_in_pages_is_read_as_one_tensor() -> None:
    states = noise(2, 21, 8)
    for size in SIZES:
        assert torch.equal(in_pages(states, size, [21, 21]).read(), states)
    assert torch.equal(PagedRows.of(states[:, 3:17]).read(), states[:, 3:17])
    with pytest.raises(ValueError, match="int32"):
        PagedRows(states, torch.zeros(2, 1, dtype=torch.int64), 21).arguments()


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "rows", "lengths", "softcap", "sinks"),
    [
        (6, 2, 64, 9, [70, 41], None, False),
        (4, 4, 32, 64, [300, 299, 1, 16], 5.0, True),
        (8, 1, 24, 1, [37], None, True),
    ],
)
def test_attention_columns(
    heads: int,
    kv_heads: int,
    width: int,
    rows: int,
    lengths: list[int],
    softcap: float | None,
    sinks: bool,
    dtype: torch.dtype,
    reduce: Literal["sum", "max"],
) -> None:
    entries = max(lengths) + 5
    query, keys = noise(rows, heads, width, dtype=dtype), noise(kv_heads, entries, width, dtype=dtype)
    # Gaps, as a pruned head has them; some entries are newer than some rows.
    positions = (torch.arange(entries, dtype=torch.int32) * 3).repeat(kv_heads, 1)
    rest = torch.tensor(lengths), torch.arange(rows) + 3 * max(lengths) - rows // 2
    limits = {"scale": 0.3, "softcap": softcap, "sinks": noise(heads) if sinks else None}
    whole = query, PagedRows.of(keys), PagedRows.of(positions), *rest
    expected = attention_columns_reference(*whole, reduce=reduce, **limits)  # type: ignore[arg-type]
    for size in SIZES:
        paged = in_pages(keys, size, lengths), in_pages(positions, size, lengths)
        found = attention_columns(query, *paged, *rest, reduce=reduce, **limits, backend="cpu")  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_no_rows_give_nothing() -> None:
    """A sequence that begins with cached entries may have to forget some before it has computed a row."""
    places = torch.arange(9, dtype=torch.int32).expand(2, 9)
    arguments = (
        torch.randn(0, 4, 16),
        PagedRows.of(torch.randn(2, 9, 16)),
        PagedRows.of(places),
        torch.tensor([9, 9]),
        torch.arange(0),
    )
    found = attention_columns(*arguments, reduce="sum", scale=1.0, backend="cpu")
    assert torch.equal(found, torch.zeros(2, 9))


def test_row_that_sees_nothing_gives_nothing() -> None:
    keys, positions = PagedRows.of(noise(1, 5, 32)), PagedRows.of(torch.arange(10, 15, dtype=torch.int32)[None])
    arguments = noise(2, 1, 32), keys, positions, torch.tensor([5]), torch.tensor([3, 20])
    found = attention_columns(*arguments, reduce="sum", scale=1.0, backend="cpu")
    assert float(found.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize(("heads", "kv_heads", "width", "entries"), [(6, 2, 64, 517), (2, 2, 128, 31), (3, 1, 40, 9)])
@pytest.mark.parametrize("turned", [False, True])
def test_expected_logits(heads: int, kv_heads: int, width: int, entries: int, turned: bool) -> None:
    keys, factors = noise(kv_heads, entries, width), noise(heads, width, width)
    keys[..., 3] += 100  # as biases make it
    keys = keys.bfloat16()
    lengths = [entries - 5 * head for head in range(kv_heads)]
    angles = noise(1, width // 2 - 4)
    turn = (angles.cos(), angles.sin()) if turned else None
    moments = noise(heads, width), factors @ factors.mT / width, turn, 0.7
    expected = expected_logits_reference(PagedRows.of(keys), *moments)
    for size in SIZES:
        found = expected_logits(in_pages(keys, size, lengths), torch.tensor(lengths), *moments, "cpu")
        assert_same(found, expected, [length for length in lengths for _ in range(heads // kv_heads)], atol=0.05)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 40, 128])
def test_norms_and_cosines(width: int, dtype: torch.dtype) -> None:
    lengths = [90, 1, 17]
    keys = noise(3, 90, width, dtype=dtype)
    keys[0, 5] = 0
    numbers = torch.tensor(lengths)
    norms = torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32)
    cosines = mean_cosines_reference(PagedRows.of(keys), numbers)
    assert float(cosines[1, 0]) == pytest.approx(1, abs=1e-5)
    for size in SIZES:
        paged = in_pages(keys, size, lengths)
        assert_same(entry_norms(paged, numbers, "cpu"), norms, lengths)
        assert_same(mean_cosines(paged, numbers, "cpu"), cosines, lengths)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "width"), [(128, 64), (32, 16), (128, 40)])
def test_lag_ranks(size: int, width: int, dtype: torch.dtype) -> None:
    first, lengths = 3, [3 * size + 7, 2 * size + 2]
    keys, values = (noise(2, 3 * size + 7, width + extra, dtype=dtype)[..., :width] for extra in (1, 2))
    keys[0, first + size : first + 2 * size] = keys[0, size]  # no range, and equal scores, which keep their order
    values[0, first + size : first + 2 * size] = values[0, size]
    expected = torch.full((2, 3 * size + 7), 9.0)
    numbers = torch.tensor(lengths)
    lag_ranks_reference(expected, PagedRows.of(keys), PagedRows.of(values), numbers, first=first, size=size)
    assert (expected[1] == 9).all(), "a partition without a complete one behind it"
    assert ((expected[0] < 1) == (torch.arange(3 * size + 7) - first < 2 * size)).logical_or(expected[0] == 9).all()
    for page in SIZES:
        paged = in_pages(keys, page, lengths), in_pages(values, page, lengths)
        found = torch.full_like(expected, 9.0)
        lag_ranks(found, *paged, numbers, first=first, size=size, backend="cpu")
        assert torch.equal(found == 9, expected == 9)
        ranks, known = (part[0, first : first + 2 * size].view(2, size) for part in (found, expected))
        # Sums in another order may exchange neighbours whose scores agree to the last digits.
        assert float(((ranks - known).abs() > 1.5 / size).float().mean()) < 0.01
        assert torch.equal(ranks.sort(-1).values, known.sort(-1).values)
        assert torch.equal(ranks[1], torch.arange(size) / size)


@pytest.mark.parametrize("size", [1, 16])
def test_means_by_token(size: int) -> None:
    lengths, positions = torch.tensor([30, 7]), torch.stack([torch.arange(40), torch.arange(0, 120, 3)]).int()
    scores = noise(2, 40)
    scores[1, 7:] = float("nan")
    found, expected = (
        mean_by_token(scores, positions, lengths, 120, size, backend) for backend in ("cpu", "reference")
    )
    assert_same(found, expected, lengths.tolist())


@pytest.mark.parametrize(("rows", "heads", "width", "half"), [(300, 3, 64, 32), (1, 2, 32, 10), (17, 1, 128, 64)])
def test_moments(rows: int, heads: int, width: int, half: int) -> None:
    query, angles = noise(rows, 2 * heads, width, dtype=torch.bfloat16)[:, :heads], noise(rows, half)
    before = noise(heads, width, 1) * noise(heads, 1, width)
    sums = [(noise(heads, width), before + before.mT) for _ in range(2)]
    for (total, outer), backend in zip(sums, ("cpu", "reference"), strict=True):
        add_moments(query, angles.cos(), angles.sin(), total, outer, backend)  # type: ignore[arg-type]
    torch.testing.assert_close(sums[0][0], sums[1][0], atol=1e-4, rtol=1e-4)
    # Each factor is rounded to 8 bits; errors of many rows partly cancel.
    torch.testing.assert_close(sums[0][1], sums[1][1], atol=0.01 * rows**0.5 + 0.01, rtol=0.01)
    assert torch.equal(sums[0][1], sums[0][1].mT)
    for found, expected in zip(moments_of(*sums[1], rows, "cpu"), moments_of(*sums[1], rows), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("size", "newest"), [(5, 80), (1, 0), (3, 10**6)])
def test_means_by_neighbours(size: int, newest: int) -> None:
    lengths, positions = [30, 33, 1], torch.stack([torch.arange(s, s + 3 * 33, 3) for s in range(3)]).int()
    scores = noise(3, 33)
    scores[0, 30:] = scores[2, 1:] = 0
    paged, numbers = in_pages(positions, 4, lengths), torch.tensor(lengths)
    found = mean_by_neighbours(scores, paged, numbers, newest, size, "cpu")
    assert_same(found, mean_by_neighbours(scores, PagedRows.of(positions), numbers, newest, size), lengths)


@pytest.mark.parametrize("sinks", [0, 7, 70])
def test_mean_probabilities(sinks: int) -> None:
    lengths, positions = [61, 30], torch.stack([torch.arange(61), 2 * torch.arange(61)]).int()
    logits = 30 * noise(6, 61)
    expected = mean_probabilities(logits.clone(), PagedRows.of(positions), torch.tensor(lengths), sinks)
    found = mean_probabilities(logits, in_pages(positions, 16, lengths), torch.tensor(lengths), sinks, "cpu")
    assert_same(found, expected, lengths)
    assert float(found[1, :30].sum()) == pytest.approx(1 if sinks < 60 else 0, abs=1e-5)
