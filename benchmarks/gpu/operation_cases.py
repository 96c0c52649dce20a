"""The other kernels: each against the bytes it must move, and against plain torch."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu.measure import Meter, Row, Work
from quire.kernels import layers_reference as reference
from quire.kernels.append_rotated import Rotation, append_rotated
from quire.kernels.append_rotated_triton import append_rotated_triton
from quire.kernels.cache_reference import append_kv_reference
from quire.kernels.cache_triton import append_kv_triton
from quire.kernels.compaction_reference import compact_kv
from quire.kernels.compaction_triton import compact_kv_triton
from quire.kernels.layers_triton import add_rms_norm_triton, gated_activation_triton
from quire.kernels.norm import add_rms_norm
from quire.kernels.page_bounds_reference import page_key_bounds
from quire.kernels.page_bounds_triton import page_key_bounds_triton

Pair = tuple[Callable[[], object], Callable[[], object], Work]
PAGE = 16


def append_case(device: torch.device, dtype: torch.dtype, tokens: int) -> Pair:
    """New keys and values of 8 heads of 128, rotated before: what a model of the transformers library stores."""
    pool, held, places, positions = _pages(device, dtype, tokens)
    fused = torch.randn(tokens, 48, 128, device=device, dtype=dtype)
    key, value = fused[:, 32:40], fused[:, 40:]
    arguments = (pool, held, key, value, places, positions)
    work = Work(2 * 2 * key.numel() * dtype.itemsize + tokens * 8 * 12)
    return lambda: append_kv_triton(*arguments), lambda: append_kv_reference(*arguments), work


def rotated_append_case(device: torch.device, dtype: torch.dtype, tokens: int, normed: bool) -> Pair:
    """32 query and 8 key heads of 128 rotated, with norms before if asked for, and keys and values stored."""
    pool, held, places, positions = _pages(device, dtype, tokens)
    fused = torch.randn(tokens, 48, 128, device=device, dtype=dtype)
    cos, sin = (torch.rand(tokens, 64, device=device, dtype=dtype) for _ in range(2))
    weight = torch.ones(40, 128, device=device, dtype=dtype) if normed else None
    arguments = (Rotation(fused[:, :40], cos, sin, weight, 1e-6), fused[:, 40:], pool, held, places, positions)
    work = Work((2 * fused.numel() + 2 * cos.numel()) * dtype.itemsize + tokens * 8 * 12)
    return lambda: append_rotated_triton(*arguments), lambda: append_rotated(*arguments), work


def _pages(device: torch.device, dtype: torch.dtype, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """pool, entry_positions, destinations and positions of so many tokens of 8 heads of 128."""
    pages = max(64, tokens)
    pool = torch.zeros(pages, 2, PAGE, 128, device=device, dtype=dtype)
    held = torch.zeros(pages, PAGE, dtype=torch.int32, device=device)
    places = torch.randperm(pages * PAGE, device=device)[: tokens * 8].view(tokens, 8)
    return pool, held, places, torch.arange(tokens, device=device)


def compaction_case(device: torch.device, dtype: torch.dtype, heads: int, total: int, in_place: bool) -> Pair:
    """Heads of 128 keep every fourth entry."""
    columns = total // PAGE
    pool = torch.zeros(2 * heads * columns, 2, PAGE, 128, device=device, dtype=dtype)
    held = torch.zeros(len(pool), PAGE, dtype=torch.int32, device=device)
    source, target = torch.randperm(len(pool), device=device).int().view(2, heads, columns).unbind()
    keep = torch.arange(0, total, 4, dtype=torch.int32, device=device).repeat(heads, 1)
    counts = torch.full((heads,), keep.shape[1], dtype=torch.int32, device=device)
    arguments = (pool, held, source, source if in_place else target, keep, counts)
    work = Work(keep.numel() * 2 * (2 * 128 * dtype.itemsize + 4))
    return (
        lambda: compact_kv_triton(*arguments, in_place=in_place),
        lambda: compact_kv(*arguments, in_place=in_place),
        work,
    )


def bounds_case(device: torch.device, dtype: torch.dtype, pages: int) -> Pair:
    """Full pages."""
    pool = torch.randn(pages, 2, PAGE, 128, device=device, dtype=dtype)
    bounds = torch.empty(pages, 2, 128, device=device, dtype=dtype)
    ids = torch.randperm(pages, device=device).int()
    counts = torch.full_like(ids, PAGE)
    arguments = (bounds, pool, ids, counts)
    work = Work((PAGE + 2) * pages * 128 * dtype.itemsize)
    return lambda: page_key_bounds_triton(*arguments), lambda: page_key_bounds(*arguments), work


def norm_case(device: torch.device, dtype: torch.dtype, rows: int, width: int) -> Pair:
    """A residual added, then normalised."""
    x, residual = (torch.randn(rows, width, device=device, dtype=dtype) for _ in range(2))
    weight = torch.ones(width, device=device, dtype=dtype)
    arguments = (x, residual, weight, 1e-6)
    work = Work(4 * x.numel() * dtype.itemsize)
    return lambda: add_rms_norm_triton(*arguments), lambda: add_rms_norm(*arguments), work


def gated_case(device: torch.device, dtype: torch.dtype, rows: int, width: int) -> Pair:
    """silu(gate) * up."""
    both = torch.randn(rows, 2 * width, device=device, dtype=dtype)
    work = Work(3 * rows * width * dtype.itemsize)
    return lambda: gated_activation_triton(both, "silu"), lambda: reference.gated_activation(both, "silu"), work


def rows(meter: Meter, dtype: torch.dtype, *, tiny: bool) -> Iterator[Row]:
    """Every operation at decode and at prompt sizes; the torch version of compaction syncs, so only ours is timed."""
    device = meter.device
    for tokens in (4,) if tiny else (64, 4096):
        cases = {
            f"append {tokens} tokens": append_case(device, dtype, tokens),
            f"norm + residual {tokens} x 4096": norm_case(device, dtype, tokens, 4096),
            f"rope + append {tokens} x 40 heads": rotated_append_case(device, dtype, tokens, False),
            f"qk norm + rope + append {tokens} x 40 heads": rotated_append_case(device, dtype, tokens, True),
            f"silu mul {tokens} x 14336": gated_case(device, dtype, tokens, 128 if tiny else 14336),
        }
        for name, (run, plain, work) in cases.items():
            yield meter.row("operation", name, "quire", run, work)
            yield meter.row("operation", name, "torch", plain, work)
    pages = 8 if tiny else 1 << 17
    run, plain, work = bounds_case(device, dtype, pages)
    yield meter.row("operation", f"key bounds of {pages} pages", "quire", run, work)
    yield meter.row("operation", f"key bounds of {pages} pages", "torch", plain, work)
    heads, total = (2, 64) if tiny else (256, 8192)
    for in_place in (True, False):
        run, _, work = compaction_case(device, dtype, heads, total, in_place)
        name = f"compaction of {heads} heads x {total}{', in place' if in_place else ''}"
        yield meter.row("operation", name, "quire", run, work)
