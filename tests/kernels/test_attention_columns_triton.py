"""What entries get from given rows: the Triton kernel against the reference, in pages and side by side."""

from typing import Any, Literal

import pytest
import torch

from quire.kernels.attention_columns import attention_columns, attention_columns_reference
from quire.kernels.paged_rows import PagedRows

from .test_scores import in_pages, noise
from .triton_interpreter import DEVICES, DTYPES, attention_columns_triton, tolerance

pytestmark = pytest.mark.parametrize("device", DEVICES)


def moved(paged: PagedRows, device: str) -> PagedRows:
    """The same there, pages as far apart as they were."""
    whole = paged.pages._base
    pages = paged.pages.to(device) if whole is None or whole.dim() < 3 else whole.to(device)[:, 1]
    return PagedRows(pages, paged.table.to(device), paged.entries)


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "rows", "lengths", "size", "softcap", "sinks"),
    [
        (6, 2, 64, 9, [70, 41], 16, None, False),
        (4, 4, 40, 20, [130, 129, 1, 16], 48, 5.0, True),
        (8, 1, 24, 1, [37], 4, None, True),
    ],
)
def test_it_is_the_reference(
    device: str,
    heads: int,
    kv_heads: int,
    width: int,
    rows: int,
    lengths: list[int],
    size: int,
    softcap: float | None,
    sinks: bool,
    dtype: torch.dtype,
    reduce: Literal["sum", "max"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entries = max(lengths) + 5
    query, keys = noise(rows, 2 * heads, width, dtype=dtype)[:, :heads], noise(kv_heads, entries, width, dtype=dtype)
    # Gaps, as a pruned head has them; some entries are newer than some rows, and some rows see nothing.
    positions = (torch.arange(entries, dtype=torch.int32) * 3 + 2).repeat(kv_heads, 1)
    held, last = torch.tensor(lengths), torch.arange(rows) + 3 * max(lengths) - rows // 2
    last[0] = 0 if rows > 1 else last[0]
    options: dict[str, Any] = {"reduce": reduce, "scale": 0.3, "softcap": softcap}
    own = noise(heads) if sinks else None
    whole = PagedRows.of(keys.float()), PagedRows.of(positions)
    expected = attention_columns_reference(query.float(), *whole, held, last, **options, sinks=own)
    paged = in_pages(keys, size, lengths), in_pages(positions, size, lengths)
    there: Any = (query.to(device), *(moved(part, device) for part in paged), held.to(device), last.to(device))
    found = attention_columns(*there, **options, sinks=None if own is None else own.to(device), backend="triton")
    # A row that sees nothing gives NaN in plain torch if it has no sink: it counts for nothing.
    if rows > 1 and not sinks:
        kept = (query[1:].float(), *whole, held, last[1:])
        expected = attention_columns_reference(*kept, **options)
    torch.testing.assert_close(found.cpu(), expected, **tolerance(dtype))
    monkeypatch.setattr(attention_columns_triton, "MAX_SUMS", 400)
    again = attention_columns(*there, **options, sinks=None if own is None else own.to(device), backend="triton")
    torch.testing.assert_close(again, found, rtol=1e-5, atol=1e-6)


def test_no_rows_and_no_entries_give_nothing(device: str) -> None:
    keys, places = PagedRows.of(noise(2, 9, 16)), PagedRows.of(torch.arange(9, dtype=torch.int32).repeat(2, 1))
    some = (moved(keys, device), moved(places, device), torch.tensor([9, 9], device=device))
    options: dict[str, Any] = {"reduce": "sum", "scale": 1.0, "backend": "triton"}
    nobody = torch.arange(0, device=device)
    found = attention_columns(noise(0, 4, 16).to(device), *some, nobody, **options)
    assert torch.equal(found.cpu(), torch.zeros(2, 9))
    none = torch.zeros(2, dtype=torch.int64, device=device)
    found = attention_columns(noise(1, 4, 16).to(device), *some[:2], none, torch.tensor([8], device=device), **options)
    assert torch.equal(found.cpu(), torch.zeros(2, 9))


def test_refusals(device: str) -> None:
    keys, places = PagedRows.of(noise(2, 9, 16)), PagedRows.of(torch.arange(9, dtype=torch.int32).repeat(2, 1))
    query, lengths = noise(3, 4, 16).to(device), torch.tensor([9, 9], device=device)
    rows = torch.arange(3, device=device)
    given = [query, moved(keys, device), moved(places, device), lengths, rows]
    for place, wrong, message in (
        (0, query[:, :3], "query has 3 heads, no multiple of the 2"),
        (0, query[..., :8], "keys.pages must have shape"),
        (3, lengths[:1], "lengths must have shape"),
        (4, rows[:2], "positions must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            changed: Any = [*given[:place], wrong, *given[place + 1 :]]
            attention_columns(*changed, reduce="sum", scale=1.0, backend="triton")
