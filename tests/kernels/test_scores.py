"""What policies compute over a layer's entries: the C++ kernels against plain torch."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from quire.kernels.attention_columns import attention_columns, attention_columns_reference
from quire.kernels.cpu_library import cpu_library
from quire.kernels.lag_ranks import lag_ranks, lag_ranks_reference
from quire.kernels.quadratic_form import quadratic_form, quadratic_form_reference

pytestmark = pytest.mark.skipif(cpu_library() is None, reason="no compiler")

DTYPES = [torch.float32, torch.bfloat16]


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


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
    query, keys = noise(rows, heads, width, dtype=dtype), noise(kv_heads, entries + 3, width, dtype=dtype)[:, :entries]
    for head, length in enumerate(lengths):
        keys[head, length:] = float("nan")
    # Gaps, as a pruned head has them; some entries are newer than some rows.
    positions = (torch.arange(entries, dtype=torch.int32) * 3).repeat(kv_heads, 1)
    row_positions = torch.arange(rows) + 3 * max(lengths) - rows // 2
    arguments = query, keys, positions, torch.tensor(lengths), row_positions
    limits = {"scale": 0.3, "softcap": softcap, "sinks": noise(heads) if sinks else None}
    found = attention_columns(*arguments, reduce=reduce, **limits, backend="cpu")  # type: ignore[arg-type]
    expected = attention_columns_reference(*arguments, reduce=reduce, **limits)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_no_rows_give_nothing() -> None:
    """A sequence that begins with cached entries may have to forget some before it has computed a row."""
    places = torch.arange(9, dtype=torch.int32).expand(2, 9)
    arguments = (torch.randn(0, 4, 16), torch.randn(2, 9, 16), places, torch.tensor([9, 9]), torch.arange(0))
    found = attention_columns(*arguments, reduce="sum", scale=1.0, backend="cpu")
    assert torch.equal(found, torch.zeros(2, 9))


def test_row_that_sees_nothing_gives_nothing() -> None:
    keys, positions = noise(1, 5, 32), torch.arange(10, 15, dtype=torch.int32)[None]
    arguments = noise(2, 1, 32), keys, positions, torch.tensor([5]), torch.tensor([3, 20])
    found = attention_columns(*arguments, reduce="sum", scale=1.0, backend="cpu")
    assert float(found.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize(("heads", "kv_heads", "width", "entries"), [(6, 2, 64, 517), (2, 2, 128, 31), (3, 1, 40, 9)])
def test_quadratic_form(heads: int, kv_heads: int, width: int, entries: int) -> None:
    keys, factors = noise(kv_heads, entries, width, dtype=torch.bfloat16), noise(heads, width, width)
    linear, square = noise(heads, width), factors @ factors.mT / width
    found = quadratic_form(keys, linear, square, "cpu")
    torch.testing.assert_close(found, quadratic_form_reference(keys, linear, square), atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "width"), [(128, 64), (32, 16), (128, 40)])
def test_lag_ranks(size: int, width: int, dtype: torch.dtype) -> None:
    keys, values = (noise(2, 3 * size + extra, width, dtype=dtype)[:, : 3 * size] for extra in (1, 2))
    keys[0, size : 2 * size] = keys[0, size]  # no range, and equal scores, which keep the order of their entries
    values[0, size : 2 * size] = values[0, size]
    found, expected = lag_ranks(keys, values, size, "cpu"), lag_ranks_reference(keys, values, size)
    # Sums in another order may exchange neighbours whose scores agree to the last digits.
    assert float(((found - expected).abs() > 1.5 / size).float().mean()) < 0.01
    assert torch.equal(found.sort(-1).values, expected.sort(-1).values)
    assert torch.equal(found[0, 1], torch.arange(size) / size)
