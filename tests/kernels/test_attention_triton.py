"""The Triton attention against the naive loop and, for larger cases, against the reference that passes it."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.kernels.attention import paged_attention
from quire.kernels.attention_mass_reference import attention_log_sums
from quire.kernels.attention_reference import paged_attention_reference

from .oracle import PagedCase, make_case, naive_append, naive_attention
from .triton_interpreter import (
    DEVICES,
    DTYPES,
    attention_arguments,
    attention_triton,
    log_sum_arguments,
    to_device,
    tolerance,
    widened,
)

pytestmark = pytest.mark.parametrize("device", DEVICES)
SCALE = 0.3
HALF = torch.float16
"""Takes the tiles of tensor cores; float32 takes one small tile, which the interpreter needs long for."""


def attend(case: PagedCase, device: str, **options: Any) -> Tensor:
    """The kernel's result, on the CPU."""
    case = to_device(case, device)
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    result: Tensor = attention_triton.paged_attention_triton(
        **attention_arguments(case), max_kept=case.max_kept, value_dim=case.value.shape[-1], scale=SCALE, **options
    )
    assert result.dtype == case.query.dtype
    return result.cpu()


def check(case: PagedCase, device: str, **options: Any) -> None:
    """Result equals the reference's in float32."""
    naive_append(case)
    result, wide = attend(case, device, **options), widened(case)
    expected = paged_attention_reference(
        **attention_arguments(wide), max_kept=case.max_kept, value_dim=case.value.shape[-1], scale=SCALE, **options
    )
    torch.testing.assert_close(result.float(), expected, **tolerance(case.query.dtype))


@pytest.mark.parametrize("options", [{}, {"window": 4, "softcap": 3.0}])
def test_equals_the_naive_loop(device: str, options: dict[str, Any]) -> None:
    case = make_case([[5, 0, 13], [16, 17, 1], [8, 40, 3]], [1, 4, 9], gap=2)
    naive_append(case)
    expected = naive_attention(case, scale=SCALE, **options)
    torch.testing.assert_close(attend(case, device, **options).double(), expected, **tolerance(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_lengths_that_the_device_alone_knows(device: str, dtype: torch.dtype) -> None:
    """As in CUDA graphs, where sequences at the end may be without rows; tables are those of all slots."""
    case = make_case([[5, 0], [130, 7], [16, 17], [9, 9]], [1, 9, 1, 4], dtype=dtype)
    naive_append(case)
    expected = attend(case, device)
    there = to_device(case, device)
    ends, rows = [*case.query_start.tolist(), 15, 15], torch.tensor([0, 1, 2, 3, 0, 3], device=device)
    start = torch.tensor(ends, dtype=torch.int32, device=device)
    given = attention_arguments(there) | {"query_lengths": None, "query_start": start, "table_rows": rows}
    for compute in (attention_triton.paged_attention_triton, paged_attention):
        result = compute(**given, max_kept=140, value_dim=16, scale=SCALE)
        torch.testing.assert_close(result.cpu(), expected, **tolerance(dtype))


@pytest.mark.parametrize("page_size", [8, 16, 24, 64])
@pytest.mark.parametrize("kept", [0, 7, 8, 15, 17, 63, 64])
def test_lengths_around_page_and_tile_boundaries(device: str, page_size: int, kept: int) -> None:
    check(make_case([[kept, kept + 1], [2, 0]], [1, 1], page_size=page_size, dtype=HALF), device)
    check(make_case([[kept, 3], [2, kept]], [17, 2], page_size=page_size, dtype=HALF), device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims_and_types(device: str, head_dim: int, dtype: torch.dtype) -> None:
    check(make_case([[70, 9], [4, 4]], [1, 6], head_dim=head_dim, page_size=16, dtype=dtype), device)


@pytest.mark.parametrize("groups", [1, 3, 4, 7, 8, 16, 24, 71, 130])
def test_group_sizes(device: str, groups: int) -> None:
    """More heads than a tile of decode rows, or than any tile, are split."""
    check(make_case([[21], [30], [5]], [1, 4, 20], groups=groups, dtype=HALF), device)


@pytest.mark.parametrize("lengths", [[1] * 5, [64, 1, 1], [1, 70, 1, 5], [16, 17, 3, 33]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_batches(device: str, lengths: list[int], dtype: torch.dtype) -> None:
    kept = [[(37 * (s + 1)) % 90, (53 * s) % 41] for s in range(len(lengths))]
    check(make_case(kept, lengths, dtype=dtype, page_size=8, gap=2), device)


@pytest.mark.parametrize("window", [1, 5, 16, 40, 1000])
@pytest.mark.parametrize("gap", [1, 3])
def test_window_counts_positions_not_entries(device: str, window: int, gap: int) -> None:
    check(make_case([[41, 3], [6, 12], [4, 64]], [1, 1, 50], gap=gap, dtype=HALF), device, window=window)


@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"sinks": True}, {"softcap": 2.0, "sinks": True, "window": 4}])
@pytest.mark.parametrize("kept", [[[21, 3], [6, 12]], [[200, 150], [0, 190]]])
def test_softcap_and_sinks(device: str, options: dict[str, Any], kept: list[list[int]]) -> None:
    if "sinks" in options:
        options = options | {"sinks": torch.linspace(-3, 3, 6)}
    check(make_case(kept, [1, 8], groups=3, gap=2), device, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_entries_are_split_where_programs_are_few(device: str, dtype: torch.dtype) -> None:
    check(make_case([[400, 33]], [1], head_dim=64, page_size=16, dtype=dtype), device)
    check(make_case([[300, 0], [3, 244]], [3, 20], groups=4, head_dim=64, page_size=16, dtype=dtype), device)


def test_values_narrower_than_keys(device: str) -> None:
    check(make_case([[9, 4], [30, 3]], [1, 25], head_dim=24, value_dim=16), device)


def test_views_into_larger_tensors(device: str) -> None:
    """Queries of a fused projection; one layer of a table and of kept lengths."""
    case = make_case([[9, 40], [12, 3]], [1, 7])
    naive_append(case)
    expected = attend(case, device)
    wide = torch.randn(case.query.shape[0], 9, case.query.shape[2])
    wide[:, 2:6] = case.query
    case.query = wide[:, 2:6]
    case.page_table = torch.stack([case.page_table * 0, case.page_table], 1)[:, 1]
    case.kept = torch.stack([case.kept * 0, case.kept], 1)[:, 1]
    assert torch.equal(attend(case, device), expected)


@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 1, 20]])
def test_sequences_are_rows_of_a_table_of_all_slots(device: str, lengths: list[int]) -> None:
    """In any order, beside slots that are not in the batch, whose table is worthless."""
    case = make_case([[9, 40], [12, 3], [0, 170]], lengths)
    naive_append(case)
    expected = attend(case, device)
    rows = torch.tensor([4, 0, 2])
    table = torch.full((6, *case.page_table.shape[1:]), 2**31 - 1, dtype=torch.int32)
    kept = torch.full((6, 2), 2**31 - 1, dtype=torch.int32)
    table[rows], kept[rows] = case.page_table, case.kept
    longest = case.max_kept
    case.page_table, case.kept = table, kept
    there = to_device(case, device)
    result = attention_triton.paged_attention_triton(
        **attention_arguments(there), max_kept=longest, value_dim=16, scale=SCALE, table_rows=rows.to(device)
    )
    assert torch.equal(result.cpu(), expected)


def test_nan_behind_the_last_entry_or_of_another_sequence_does_not_reach_a_row(device: str) -> None:
    case = make_case([[9, 70], [30, 30]], [1, 20])
    naive_append(case)
    clean = attend(case, device)
    case.pool[case.page_table[1].reshape(-1).long()] = float("nan")
    case.page_table[0, :, 19:] = case.page_table[1, 0, 0]
    tail = case.page_table[0, 0, 10 // 4].long()
    case.pool[tail, :, 10 % 4 :] = float("nan")
    poisoned = attend(case, device)
    assert torch.equal(poisoned[0], clean[0])
    assert poisoned[1:].isnan().all()


@pytest.mark.parametrize("options", [{}, {"window": 9}, {"softcap": 4.0, "sinks": torch.linspace(-2, 2, 4)}])
@pytest.mark.parametrize("lengths", [[1, 1], [20, 1]])
def test_log_sums(device: str, options: dict[str, Any], lengths: list[int]) -> None:
    case = make_case([[9, 200], [12, 3]], lengths)
    naive_append(case)
    there = to_device(case, device)
    moved: dict[str, Any] = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    sums = torch.empty(case.query.shape[:2], device=device)
    output = attention_triton.paged_attention_triton(
        **attention_arguments(there), max_kept=case.max_kept, value_dim=16, scale=SCALE, log_sums=sums, **moved
    )
    expected = attention_log_sums(**log_sum_arguments(case), scale=SCALE, **options)
    torch.testing.assert_close(sums.cpu(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(output.cpu(), attend(case, device, **options))


def test_empty_batch(device: str) -> None:
    case = make_case([[4, 4]], [1])
    case.query, case.positions, case.query_lengths = case.query[:0], case.positions[:0], ()
    case.page_table, case.kept = case.page_table[:0], case.kept[:0]
    there = to_device(case, device)
    result = attention_triton.paged_attention_triton(**attention_arguments(there), max_kept=0, value_dim=16, scale=1.0)
    assert result.shape == (0, 4, 16)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: x.int(), TypeError, "query must be floating point"),
        (lambda x: x[..., :8], ValueError, "query must have shape"),
        (lambda x: x[:, :3], ValueError, "query has 3 heads"),
        (lambda x: x.transpose(2, 3), ValueError, "pool must be contiguous"),
        (lambda x: x.long(), TypeError, "entry_positions must be int32"),
        (lambda x: x.long(), TypeError, "page_table must be int32"),
        (lambda x: x[..., :1], ValueError, "page_table's 1 pages"),
        (lambda x: x[:, :1], ValueError, "kept must have shape"),
        (lambda x: x.float(), TypeError, "query_start must be int32 or int64"),
        (lambda x: (3,), ValueError, "query_lengths must add up"),
        (lambda x: x[:1], ValueError, "positions must have shape"),
    ],
)
def test_refusals_name_the_tensor(device: str, change: Any, error: type[Exception], message: str) -> None:
    case = to_device(make_case([[9, 4]], [2]), device)
    arguments = attention_arguments(case)
    name = message.split()[0].removesuffix("'s")
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=message):
        attention_triton.paged_attention_triton(**arguments, max_kept=11, value_dim=16, scale=1.0)


_SWEEP = list(itertools.product([64, 80, 128, 256], [1, 4, 7, 8], [8, 16, 64], [None, 33]))


@pytest.mark.slow
@pytest.mark.parametrize(("head_dim", "groups", "page_size", "window"), _SWEEP)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sweep(device: str, head_dim: int, groups: int, page_size: int, window: int | None, dtype: torch.dtype) -> None:
    kept = [[0, 1], [127, 128], [129, 63], [250, 64], [17, 0]]
    case = make_case(kept, [1, 5, 70, 1, 33], groups=groups, head_dim=head_dim, page_size=page_size, gap=2, dtype=dtype)
    check(case, device, window=window)
