"""The C++ compaction does what the reference does, bit for bit, whatever the pool's type."""

import pytest
import torch

from quire.kernels.compaction_cpu import compact_kv_cpu
from quire.kernels.compaction_reference import compact_kv
from quire.kernels.cpu_library import cpu_library

pytestmark = pytest.mark.skipif(cpu_library() is None, reason="no C++ compiler")


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 16), (7, 5)])
def test_compaction(in_place: bool, dtype: torch.dtype, head_dim: int, page_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    totals, counts = [200, 40, 130, 65, 90], [130, 0, 129, 65, 20]
    columns = -(-max(totals) // page_size)
    pages = torch.randperm(2 * len(totals) * columns, generator=generator).to(torch.int32)
    source, target = pages.view(2, len(totals), columns).unbind()
    pool = torch.randn(len(pages), 2, page_size, head_dim, generator=generator).to(dtype)
    positions = torch.arange(len(pages) * page_size, dtype=torch.int32).view(len(pages), page_size)
    keep = torch.full((len(counts), max(counts)), 10**6, dtype=torch.int32)  # past a count anything may stand
    for row, (count, total) in enumerate(zip(counts, totals, strict=True)):
        keep[row, :count] = torch.randperm(total, generator=generator)[:count].sort().values
    keep[4, :20] = torch.arange(60, 80)  # one run
    tables = source, source if in_place else target
    held = torch.tensor(counts, dtype=torch.int32)
    expected, ours = [(pool.clone(), positions.clone()) for _ in range(2)]
    compact_kv(*expected, *tables, keep, held, in_place=in_place)
    compact_kv_cpu(*ours, *tables, keep, held, in_place=in_place)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
    assert not torch.equal(ours[1], positions)


def test_what_the_kernel_cannot_read_is_named() -> None:
    pool, positions, table = torch.zeros(2, 2, 4, 8), torch.zeros(2, 4, dtype=torch.int32), torch.zeros(1, 2).int()
    keep, counts = torch.zeros(1, 3).int(), torch.zeros(1).int()
    with pytest.raises(ValueError, match=r"^keep must be"):
        compact_kv_cpu(pool, positions, table, table, keep.long(), counts, in_place=True)
    with pytest.raises(ValueError, match=r"^counts must be"):
        compact_kv_cpu(pool, positions, table, table, keep, counts.repeat(2), in_place=True)
    with pytest.raises(ValueError, match="contiguous"):
        compact_kv_cpu(pool.transpose(1, 2), positions, table, table, keep, counts, in_place=True)
