"""The Triton cache kernels (append, compaction, page bounds) against their references, bit by bit: they only copy."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.kernels.cache import entry_destinations
from quire.kernels.compaction_reference import compact_kv
from quire.kernels.page_bounds_reference import page_key_bounds

from .oracle import PagedCase, make_case, naive_append
from .triton_interpreter import DEVICES, cache_triton, compaction_triton, page_bounds_triton, to_device

pytestmark = pytest.mark.parametrize("device", DEVICES)


def same(a: Tensor, b: Tensor) -> None:
    """Equal, NaN for NaN."""
    torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=0, equal_nan=True)


def append(case: PagedCase, device: str) -> PagedCase:
    """The case on the device, its new entries stored by the kernel."""
    there = to_device(case, device)
    destinations = entry_destinations(
        there.page_table[:, None],
        there.kept[:, None],
        case.query_start.to(device),
        page_size=case.pool.shape[2],
        num_tokens=case.key.shape[0],
    )[0]
    cache_triton.append_kv_triton(
        there.pool, there.entry_positions, there.key, there.value, destinations, there.positions
    )
    return there


@pytest.mark.parametrize("page_size", [1, 8, 16, 24])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (80, 80), (24, 16), (128, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_append(device: str, page_size: int, head_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    shape: dict[str, Any] = {"head_dim": head_dim, "value_dim": value_dim, "page_size": page_size, "dtype": dtype}
    case = make_case([[5, 0, 13], [16, 7, 1]], [1, 4], **shape)
    there = append(make_case([[5, 0, 13], [16, 7, 1]], [1, 4], **shape), device)
    naive_append(case)
    same(there.pool, case.pool)
    same(there.entry_positions, case.entry_positions)


def test_append_casts_and_reads_views(device: str) -> None:
    case = make_case([[3, 4]], [5])
    fused = torch.randn(5, 6, 16)
    case.key, case.value = fused[:, 1:3], fused[:, 3:5]
    case.pool = case.pool.to(torch.float16)
    there = append(to_device(case, "cpu"), device)
    case.key, case.value = case.key.to(torch.float16), case.value.to(torch.float16)
    expected = make_case([[3, 4]], [5])
    expected.pool, expected.key, expected.value = expected.pool.to(torch.float16), case.key, case.value
    naive_append(expected)
    same(there.pool, expected.pool)


@pytest.mark.parametrize(
    ("position", "change", "error", "message"),
    [
        (0, lambda x: x.int(), TypeError, "pool must be floating point"),
        (1, lambda x: x[:, :1], ValueError, "entry_positions must have shape"),
        (2, lambda x: x[..., :4], ValueError, "key must have shape"),
        (3, lambda x: torch.cat([x, x], -1), ValueError, "value must be at most as wide"),
        (4, lambda x: x.int(), TypeError, "destinations must be int64"),
        (5, lambda x: x.float(), TypeError, "positions must be int32 or int64"),
    ],
)
def test_append_refusals(
    device: str, position: int, change: Callable[[Tensor], Tensor], error: type[Exception], message: str
) -> None:
    case = to_device(make_case([[3, 4]], [2]), device)
    destinations = torch.zeros(2, 2, dtype=torch.int64, device=device)
    arguments = [case.pool, case.entry_positions, case.key, case.value, destinations, case.positions]
    arguments[position] = change(arguments[position])
    with pytest.raises(error, match=message):
        cache_triton.append_kv_triton(*arguments)


def _kept(counts: list[int], totals: list[int], generator: torch.Generator) -> Tensor:
    """Ascending random indices below each total, [N, E]; arbitrary past each count."""
    keep = torch.full((len(counts), max(counts)), 10**6, dtype=torch.int32)
    for row, (count, total) in enumerate(zip(counts, totals, strict=True)):
        keep[row, :count] = torch.randperm(total, generator=generator)[:count].sort().values.to(torch.int32)
    return keep


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 16), (80, 8), (128, 24), (256, 64)])
def test_compaction(device: str, in_place: bool, head_dim: int, page_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    totals, counts = [200, 40, 130, 65], [130, 0, 129, 65]
    columns = -(-max(totals) // page_size)
    order = torch.randperm(2 * len(totals) * columns, generator=generator).to(torch.int32)
    source, target = order.view(2, len(totals), columns).unbind()
    pool = torch.randn(len(order), 2, page_size, head_dim, generator=generator)
    positions = torch.arange(len(order) * page_size, dtype=torch.int32).view(len(order), page_size)
    keep, held = _kept(counts, totals, generator), torch.tensor(counts, dtype=torch.int32)
    tables = (source, source if in_place else target)
    there = [x.to(device, copy=True) for x in (pool, positions, *tables, keep, held)]
    compaction_triton.compact_kv_triton(*there, in_place=in_place)
    compact_kv(pool, positions, *tables, keep, held, in_place=in_place)
    same(there[0], pool)
    same(there[1], positions)


def test_compaction_by_hand(device: str) -> None:
    pool = torch.arange(3 * 2 * 2.0).view(3, 2, 2, 1)
    positions = torch.tensor([[10, 11], [12, 13], [14, 15]], dtype=torch.int32)
    table = torch.tensor([[2, 0]], dtype=torch.int32)
    keep, counts = torch.tensor([[1, 2, 3]], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    there = [x.to(device) for x in (pool.clone(), positions.clone(), table, table, keep, counts)]
    compaction_triton.compact_kv_triton(*there, in_place=True)
    assert there[0][[2, 2, 0], 0, [0, 1, 0], 0].tolist() == [9, 0, 1]
    assert there[0][[2, 2, 0], 1, [0, 1, 0], 0].tolist() == [11, 2, 3]
    assert there[1].tolist() == [[11, 11], [12, 13], [15, 10]]


@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 16), (80, 8), (128, 24), (256, 64), (16, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_page_bounds(device: str, head_dim: int, page_size: int, dtype: torch.dtype) -> None:
    pool = torch.randn(9, 2, page_size, head_dim).to(dtype)
    pages, counts = torch.tensor([7, 2, 5], dtype=torch.int32), torch.tensor([page_size, 1, 0], dtype=torch.int32)
    # What lies behind a page's last entry is not looked at.
    pool[2, 0, 1:] = float("nan")
    bounds = torch.zeros(9, 2, head_dim, dtype=dtype)
    there = [x.to(device, copy=True) for x in (bounds, pool, pages, counts)]
    page_bounds_triton.page_key_bounds_triton(*there)
    page_key_bounds(bounds, pool, pages, counts)
    same(there[0], bounds)
    assert bounds[5, 0].eq(float("inf")).all() and bounds[0].eq(0).all()
    same(bounds[7, 0], pool[7, 0].amin(0))
