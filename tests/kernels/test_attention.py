"""Paged attention of every CPU implementation against a loop over single entries, and the cache writes before it."""

from typing import Any

import pytest
import torch

from quire.kernels import attention_reference
from quire.kernels.attention import paged_attention
from quire.kernels.attention_cpu import PagedStep
from quire.kernels.backend import Backend, resolve_backend
from quire.kernels.cache import append_kv, entry_destinations

from .oracle import PagedCase, make_case, naive_append, naive_attention

# Both sides hold the same float32 inputs; only the order of summation differs.
TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}


def store(case: PagedCase) -> torch.Tensor:
    """Destinations of the step's entries, stored through the real path."""
    destinations = entry_destinations(
        case.page_table[:, None],
        case.kept[:, None],
        case.query_start,
        page_size=case.pool.shape[2],
        num_tokens=case.query.shape[0],
    )
    append_kv(case.pool, case.entry_positions, case.key, case.value, destinations[0], case.positions)
    return destinations[0]


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each implementation; `cpu` must be there, a test machine has a compiler."""
    assert resolve_backend(torch.device("cpu"), torch.float32, request.param) == request.param
    return request.param


def attend(case: PagedCase, backend: Backend, **options: Any) -> torch.Tensor:
    """Store, then attend; the C++ kernels do both in one call."""
    paged = (case.page_table, case.kept)
    if backend == "cpu":
        table, kept = (tensor[:, None] for tensor in paged)
        step = PagedStep(case.pool, case.entry_positions, table, kept, case.query_start, case.positions)
        return step.append_and_attend(0, case.query, case.key, case.value, **options)
    store(case)
    return paged_attention(
        case.query,
        case.pool,
        case.entry_positions,
        *paged,
        case.query_start,
        case.query_lengths,
        case.positions,
        max_kept=case.max_kept,
        value_dim=case.value.shape[-1],
        backend=backend,
        **options,
    )


def check(case: PagedCase, backend: Backend, **options: Any) -> None:
    """Result equals the naive loop's."""
    result = attend(case, backend, scale=0.3, **options)
    expected = naive_attention(case, scale=0.3, **options)
    torch.testing.assert_close(result.double(), expected, **TOLERANCE)


@pytest.mark.parametrize("page_size", [1, 4, 8, 16])
@pytest.mark.parametrize("kept", [0, 1, 3, 4, 5, 7, 8, 15, 16, 17, 33])
def test_lengths_around_page_boundaries(backend: Backend, page_size: int, kept: int) -> None:
    check(make_case([[kept, kept], [2, 2]], [1, 1], page_size=page_size), backend)
    check(make_case([[kept, kept], [2, 2]], [5, 3], page_size=page_size), backend)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("groups", [1, 2, 3, 7, 8])
def test_head_dims_and_groups(backend: Backend, head_dim: int, groups: int) -> None:
    check(make_case([[9, 9, 9], [4, 4, 4]], [1, 6], head_dim=head_dim, groups=groups), backend)


@pytest.mark.parametrize("lengths", [[1, 1, 1], [1, 1, 9], [4, 1, 4], [7, 1, 1], [1]])
@pytest.mark.parametrize("gap", [1, 3])
def test_each_head_keeps_its_own_number_of_entries(backend: Backend, lengths: list[int], gap: int) -> None:
    kept = [[5, 0, 13], [16, 17, 1], [8, 40, 3]][: len(lengths)]
    check(make_case(kept, lengths, gap=gap), backend)


@pytest.mark.parametrize("window", [1, 2, 5, 16, 1000])
@pytest.mark.parametrize("gap", [1, 3])
def test_window_counts_positions_not_entries(backend: Backend, window: int, gap: int) -> None:
    check(make_case([[21, 3], [6, 12], [4, 4]], [1, 1, 8], gap=gap), backend, window=window)


@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"sinks": True}, {"softcap": 2.0, "sinks": True, "window": 4}])
@pytest.mark.parametrize("gap", [1, 2])
def test_softcap_and_sinks(backend: Backend, options: dict[str, Any], gap: int) -> None:
    case = make_case([[21, 3], [6, 12], [0, 0]], [1, 1, 8], groups=3, gap=gap)
    if "sinks" in options:
        options = {**options, "sinks": torch.linspace(-3, 3, 6)}
    check(case, backend, **options)


def test_a_long_window_chunk_spans_several_inner_blocks(backend: Backend) -> None:
    """Rows whose first hundreds of entries are all masked must not turn into NaN."""
    check(make_case([[1400, 1400]], [6], page_size=16), backend, window=20)


@pytest.mark.parametrize("options", [{}, {"window": 7}, {"softcap": 3.0}])
def test_slices_of_queries_equal_the_whole(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = attend(make_case([[9, 4], [30, 2]], [40, 40]), "reference", scale=0.3, **options)
    monkeypatch.setattr(attention_reference, "MAX_SCORES", 2 * 4 * 72 * 3)  # three queries at a time
    sliced = attend(make_case([[9, 4], [30, 2]], [40, 40]), "reference", scale=0.3, **options)
    torch.testing.assert_close(sliced, whole, **TOLERANCE)


def test_values_narrower_than_keys(backend: Backend) -> None:
    check(make_case([[9, 4], [3, 3]], [1, 5], head_dim=24, value_dim=16), backend)


@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}])
def test_bfloat16_scores_are_computed_in_float32(backend: Backend, options: dict[str, Any]) -> None:
    """Within the rounding of inputs to and output from 8 bits (2**-9 each); bfloat16 scores would be ten times off."""
    case = make_case([[300, 300], [40, 40]], [1, 5], head_dim=64, dtype=torch.bfloat16)
    case.query *= 8
    result = attend(case, backend, scale=0.3, **options)
    expected = naive_attention(case, scale=0.3, **options)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), expected, rtol=0.01, atol=0.02)


@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}])
def test_nan_of_one_sequence_does_not_reach_another(backend: Backend, options: dict[str, Any]) -> None:
    clean = attend(make_case([[9, 9], [30, 30]], [1, 1]), backend, scale=0.3, **options)
    case = make_case([[9, 9], [30, 30]], [1, 1])
    case.pool[case.page_table[1].reshape(-1).long()] = float("nan")
    # The first sequence is shorter: its surplus columns name a page of the poisoned one.
    case.page_table[0, :, 3:] = case.page_table[1, 0, 0]
    poisoned = attend(case, backend, scale=0.3, **options)
    assert torch.equal(poisoned[0], clean[0])
    assert poisoned[1].isnan().all()


def test_a_row_alone_or_among_others_gives_the_same(backend: Backend) -> None:
    kept, lengths = [[5, 8], [70, 2], [8, 8], [31, 33]], [1, 1, 4, 1]
    together = attend(make_case(kept, lengths), backend, scale=0.3)
    mixed = make_case(kept, lengths)
    row = 0
    for s, n in enumerate(lengths):
        alone = PagedCase(
            mixed.pool,
            mixed.entry_positions,
            mixed.page_table[s : s + 1],
            mixed.kept[s : s + 1],
            (n,),
            mixed.query[row : row + n],
            mixed.key[row : row + n],
            mixed.value[row : row + n],
            mixed.positions[row : row + n],
        )
        torch.testing.assert_close(attend(alone, backend, scale=0.3), together[row : row + n], **TOLERANCE)
        row += n


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("value_dim", [8, 16])
def test_append_writes_the_named_entries_and_nothing_else(page_size: int, value_dim: int) -> None:
    case = make_case([[3, 9], [0, 4]], [7, 1], page_size=page_size, value_dim=value_dim)
    expected = make_case([[3, 9], [0, 4]], [7, 1], page_size=page_size, value_dim=value_dim)
    naive_append(expected)
    store(case)
    assert torch.equal(case.pool.nan_to_num(99.0), expected.pool.nan_to_num(99.0))
    assert torch.equal(case.entry_positions, expected.entry_positions)


def test_destinations_differ_per_layer() -> None:
    first = make_case([[3, 9], [0, 4]], [2, 1], page_size=4)
    tables = torch.stack([first.page_table, first.page_table.flip(-1)], dim=1)
    kept = torch.stack([first.kept, first.kept * 0], dim=1)
    result = entry_destinations(tables, kept, first.query_start, page_size=4, num_tokens=3)
    assert result.shape == (2, 3, 2)
    assert result[0, 1, 0] == first.page_table[0, 0, 1] * 4  # entry 4 of head 0: second page, first place
    assert result[1, 2, 1] == tables[1, 1, 1, 0] * 4
