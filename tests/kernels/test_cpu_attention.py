"""What the C++ attention promises beyond the contract: all shapes and types, and results that depend on no others."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from quire.kernels.attention import paged_attention
from quire.kernels.attention_cpu import PagedStep

from .oracle import PagedCase, make_case, naive_append, naive_attention

PART = 256  # entries that are attended to at a time, see kPart in cpu_attention.cpp


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Tests may change the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def attend(case: PagedCase, scale: float = 0.3, visible: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    table, kept = case.page_table[:, None], case.kept[:, None]
    step = PagedStep(case.pool, case.entry_positions, table, kept, case.query_start, case.positions, visible)
    return step.append_and_attend(0, case.query, case.key, case.value, scale=scale, **options)


@pytest.mark.parametrize("head_dim", [8, 16, 24, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5, 7, 8, 40])
def test_head_dims_and_groups(head_dim: int, groups: int) -> None:
    """Dims that are no multiple of the vector, groups that are no multiple of the tile, groups larger than a tile."""
    case = make_case([[0, 70], [30, 9]], [1, 3], head_dim=head_dim, groups=groups, page_size=16)
    expected = make_case([[0, 70], [30, 9]], [1, 3], head_dim=head_dim, groups=groups, page_size=16)
    naive_append(expected)
    # The same float32 numbers, added up in another order; scores grow with the head dim.
    torch.testing.assert_close(
        attend(case, scale=0.1).double(), naive_attention(expected, scale=0.1), rtol=1e-4, atol=5e-5
    )
    assert torch.equal(case.pool.nan_to_num(99.0), expected.pool.nan_to_num(99.0))
    assert torch.equal(case.entry_positions, expected.entry_positions)


@pytest.mark.parametrize("page_size", [4, 8, 16, 64])
@pytest.mark.parametrize("kept", [PART - 2, PART - 1, PART, 2 * PART - 1, 2 * PART, 700])
def test_lengths_around_the_borders_of_parts(page_size: int, kept: int) -> None:
    case = make_case([[kept, 3], [0, kept]], [1, 2], page_size=page_size, gap=2)
    result = attend(case)
    torch.testing.assert_close(result.double(), naive_attention(case, scale=0.3), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("lengths", [[1, 1], [40, 1], [3, 70]])
@pytest.mark.parametrize("window", [None, 1, 33, 300])
@pytest.mark.parametrize("extra", [{}, {"softcap": 5.0}, {"sinks": True}])
def test_bfloat16(lengths: list[int], window: int | None, extra: dict[str, Any]) -> None:
    """Inputs are bfloat16 exactly on both sides and sums are float32, so what differs is the rounding of the output:
    2**-9 of it, and as much again where a sum of rounded weights is near the border."""
    case = make_case([[300, 20], [5, 90]], lengths, head_dim=64, page_size=16, gap=2, dtype=torch.bfloat16)
    if "sinks" in extra:
        extra = {"sinks": torch.linspace(-3, 3, 4)}
    result = attend(case, scale=0.1, window=window, **extra)
    expected = naive_attention(case, scale=0.1, window=window, **extra)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), expected, rtol=2**-8, atol=2**-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_depends_neither_on_the_batch_nor_on_threads(dtype: torch.dtype) -> None:
    """To the bit: long sequences are cut into the same parts whoever computes them."""
    kept, lengths = [[900, 30], [70, 2], [8, 600], [31, 33]], [1, 1, 40, 5]
    torch.set_num_threads(1)
    together = attend(make_case(kept, lengths, head_dim=64, dtype=dtype))
    torch.set_num_threads(2)
    assert torch.equal(attend(make_case(kept, lengths, head_dim=64, dtype=dtype)), together)
    whole, row = make_case(kept, lengths, head_dim=64, dtype=dtype), 0
    for s, n in enumerate(lengths):
        assert torch.equal(attend(_rows(whole, s, row, n)), together[row : row + n])
        row += n


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_that_are_read_whole_equal_heads_in_parts(dtype: torch.dtype) -> None:
    """To the bit: alone, a long sequence is cut into parts; among many others it is not."""
    kept, lengths = [[700 + 9 * s, 40 * s] for s in range(12)], [1] * 12
    together = attend(make_case(kept, lengths, head_dim=64, page_size=16, dtype=dtype))
    whole = make_case(kept, lengths, head_dim=64, page_size=16, dtype=dtype)
    for s in range(12):
        assert torch.equal(attend(_rows(whole, s, s, 1)), together[s : s + 1])


def test_what_a_page_holds_behind_its_entries_does_not_count() -> None:
    case = make_case([[20, 3]], [5], head_dim=64, page_size=16, dtype=torch.bfloat16)
    expected = attend(dataclasses.replace(case, pool=torch.zeros_like(case.pool)))
    stale = attend(dataclasses.replace(case, pool=torch.full_like(case.pool, torch.nan), kept=case.kept * 0))
    clean = attend(dataclasses.replace(case, pool=torch.zeros_like(case.pool), kept=case.kept * 0))
    assert torch.equal(stale, clean) and not torch.equal(clean, expected)


@pytest.mark.parametrize("chunks", [[1] * 8, [3, 5], [7, 1], [1, 4, 16, 17, 120, 2, 440]])
def test_a_row_does_not_depend_on_how_its_prompt_is_cut(chunks: list[int]) -> None:
    """To the bit, so a preempted or prefix-sharing request computes what an undisturbed one does."""
    whole = make_case([[290, 290]], [sum(chunks)], head_dim=64, page_size=16, dtype=torch.bfloat16)
    at_once = attend(dataclasses.replace(whole, pool=whole.pool.clone(), entry_positions=whole.entry_positions.clone()))
    done, parts = 0, []
    for n in chunks:
        part = _rows(whole, 0, done, n)
        parts.append(attend(dataclasses.replace(part, kept=whole.kept + done)))
        done += n
    assert torch.equal(torch.cat(parts), at_once)


@pytest.mark.parametrize(
    "extra", [{}, {"window": 33}, {"softcap": 5.0}, {"sinks": torch.linspace(-3, 3, 4)}, {"scale": -0.2}]
)
@pytest.mark.parametrize("tree", [False, True])
def test_a_head_does_not_depend_on_its_group(extra: dict[str, Any], tree: bool) -> None:
    """To the bit, though many rows are computed in other lanes than few; beside NaN too."""
    case = make_case([[300, 20]], [30], head_dim=128, page_size=16, gap=2, dtype=torch.bfloat16)
    case.query[3, 1] = case.key[20, 1] = torch.nan
    visible = (torch.arange(30) * 12345678 + 1) | 1 << torch.arange(30) if tree else None
    together = attend(case, visible=visible, **extra)
    few = {key: value[::2].clone() if key == "sinks" else value for key, value in extra.items()}
    alone = attend(dataclasses.replace(case, query=case.query[:, ::2]), visible=visible, **few)
    assert alone.isnan().any()
    torch.testing.assert_close(together[:, ::2], alone, rtol=0, atol=0, equal_nan=True)


def _rows(case: PagedCase, sequence: int, first: int, count: int) -> PagedCase:
    """`count` rows, from `first` on, of one sequence; shares the pool."""
    rows = {name: getattr(case, name)[first : first + count] for name in ("query", "key", "value", "positions")}
    pages = {name: getattr(case, name)[sequence : sequence + 1] for name in ("page_table", "kept")}
    return dataclasses.replace(case, query_lengths=(count,), **rows, **pages)


def test_heads_may_be_strided() -> None:
    """Queries, keys and values as views of one fused projection, or transposed as the library passes them."""
    plain = make_case([[20, 3]], [5])
    expected = attend(make_case([[20, 3]], [5]))
    fused = torch.cat([plain.query, plain.key, plain.value], dim=1)
    query, key, value = fused.split([4, 2, 2], dim=1)
    assert torch.equal(attend(dataclasses.replace(plain, query=query, key=key, value=value)), expected)
    query, key, value = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (query, key, value))
    assert torch.equal(attend(dataclasses.replace(plain, query=query, key=key, value=value)), expected)


def test_a_type_that_differs_from_the_pools_is_the_references() -> None:
    case = make_case([[20, 3]], [5], dtype=torch.bfloat16)
    naive_append(case)
    arguments = (case.pool, case.entry_positions, case.page_table, case.kept, case.query_start, (5,), case.positions)
    options: dict[str, Any] = {"max_kept": case.max_kept, "value_dim": 16, "scale": 0.3}
    result = paged_attention(case.query.float(), *arguments, **options, backend="cpu")
    assert result.dtype == torch.float32
    assert torch.equal(result, paged_attention(case.query.float(), *arguments, **options, backend="reference"))


BROKEN: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "pool": ({"pool": torch.zeros(3, 4, 16)}, ValueError, "pool must be contiguous"),
    "positions": ({"entry_positions": torch.zeros(2, 4, dtype=torch.int32)}, ValueError, "entry_positions must be"),
    "table type": (
        {"page_table": torch.zeros(1, 2, 3, dtype=torch.int64)},
        TypeError,
        "page_table must be torch.int32",
    ),
    "kept": ({"kept": torch.zeros(1, 3, dtype=torch.int32)}, ValueError, r"kept must be \[1, 2\]"),
    "query": ({"query": torch.zeros(5, 3, 16)}, ValueError, "query must be"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_wrong_arguments_are_refused_by_name(name: str) -> None:
    changes, error, message = BROKEN[name]
    case = dataclasses.replace(make_case([[20, 3]], [5]), **changes)
    paged = (case.pool, case.entry_positions, case.page_table, case.kept, torch.tensor([0, 5], dtype=torch.int32))
    with pytest.raises(error, match=message):
        paged_attention(case.query, *paged, (5,), case.positions, max_kept=25, value_dim=16, scale=0.3, backend="cpu")
