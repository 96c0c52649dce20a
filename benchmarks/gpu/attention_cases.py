"""Attention over batches of several kinds: our kernels, torch's scaled_dot_product_attention, xformers, FlashInfer."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.measure import Meter, Row, Work
from quire.kernels.attention import paged_attention
from quire.kernels.attention_columns_triton import attention_columns_triton
from quire.kernels.attention_mass_triton import attention_mass_triton
from quire.kernels.attention_triton import paged_attention_triton
from quire.kernels.paged_rows import PagedRows

PAGE = 16
_MOST_DRAFTED = 32
"""Rows up to which a case is one of verification: CUDA graphs compute those without knowing how many rows are whose."""


@dataclass(frozen=True, slots=True)
class Case:
    """S equal sequences of n new rows each, over `context` entries per head, the new ones included."""

    name: str
    sequences: int
    new: int
    context: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    pruned: float = 1.0
    """Heads keep a random share of their entries between this and 1."""
    window: int | None = None
    masked: bool = False
    """Rows have masks, as those of a tree of drafts."""

    @property
    def is_plain(self) -> bool:
        """Whether others can compute it too."""
        return self.pruned == 1 and self.window is None and not self.masked


CASES = (
    Case("decode 1 x 8k", 1, 1, 8192),
    Case("decode 1 x 128k", 1, 1, 131072),
    Case("decode 8 x 8k", 8, 1, 8192),
    Case("decode 64 x 4k", 64, 1, 4096),
    Case("decode 256 x 1k", 256, 1, 1024),
    Case("decode 64 x 4k, heads 16/8", 64, 1, 4096, heads=16),
    Case("decode 64 x 4k, pruned to 20-100 %", 64, 1, 4096, pruned=0.2),
    Case("decode 64 x 4k, window 1k", 64, 1, 4096, window=1024),
    Case("verify 1 x 5 over 8k", 1, 5, 8192),
    Case("verify 8 x 9 over 8k", 8, 9, 8192),
    Case("verify 32 x 2 over 4k", 32, 2, 4096),
    Case("verify 32 x 5 over 4k", 32, 5, 4096),
    Case("verify 32 x 9 over 4k", 32, 9, 4096),
    Case("verify 8 trees of 32 over 4k", 8, 32, 4096, masked=True),
    Case("prompt 1 x 2k", 1, 2048, 2048),
    Case("prompt 1 x 8k", 1, 8192, 8192),
    Case("prompt chunk 2k over 32k", 1, 2048, 32768),
    Case("prompt 8 x 512", 8, 512, 512),
)
TINY = (
    Case("decode", 2, 1, 40, 4, 2, 16),
    Case("verify", 2, 3, 40, 4, 2, 16),
    Case("prompt", 1, 20, 30, 4, 2, 16),
    Case("tree", 2, 5, 40, 4, 2, 16, masked=True),
)


class Batch:
    """Random tensors of a case, as `paged_attention` takes them, and as the contenders do."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        s, k, d, new = case.sequences, case.kv_heads, case.head_dim, case.new
        share = torch.rand(s, k, generator=generator) * (1 - case.pruned) + case.pruned
        held = ((case.context - new) * share).int()
        columns = -(-case.context // PAGE)
        order = torch.randperm(s * k * columns, generator=generator).int().view(s, k, columns)
        rows = torch.arange(s * k * columns * PAGE, dtype=torch.int32) % (columns * PAGE)
        positions = torch.empty(s * k * columns, PAGE, dtype=torch.int32)
        positions[order.view(-1).long()] = rows.view(-1, PAGE)
        self.case, self.totals = case, held + new
        self.lengths = (new,) * s
        shape = (s * k * columns, 2, PAGE, d)
        # A pool for each layer of a model is large: drawn on the device.
        self.pool = torch.randn(shape, device=device, dtype=dtype)
        self.query = torch.randn(s * new, case.heads, d, device=device, dtype=dtype)
        self.table, self.kept = order.to(device), held.to(device)
        self.start = (torch.arange(s + 1, dtype=torch.int32) * new).to(device)
        self.positions = torch.arange(case.context - new, case.context).repeat(s).to(device)
        self.entry_positions = positions.to(device)

    def masks(self) -> Tensor | None:
        """Of trees in which row i follows row (i - 1) // 2."""
        masks = [1]
        for row in range(1, self.case.new if self.case.masked else 1):
            masks.append(masks[(row - 1) // 2] | 1 << row)
        return torch.tensor(masks * self.case.sequences, device=self.pool.device) if self.case.masked else None

    def arguments(self) -> dict[str, Any]:
        """Of `paged_attention`, but for masks."""
        shared: dict[str, Any] = {"query": self.query, "pool": self.pool, "entry_positions": self.entry_positions}
        shared |= {"page_table": self.table, "kept": self.kept, "query_start": self.start}
        shared |= {"query_lengths": self.lengths, "positions": self.positions}
        return shared | {"max_kept": self.case.context, "scale": 0.1, "window": self.case.window}

    def work(self, *, keys_only: bool = False) -> Work:
        """Bytes and FLOPs that the case cannot do without."""
        case, item = self.case, self.pool.itemsize
        seen = self.totals.double() if case.window is None else self.totals.double().clamp(max=case.window + case.new)
        half = 1 if keys_only else 2
        rows = 2 * self.query.numel() * item
        pairs = float((seen - (case.new - 1) / 2).sum()) * case.new
        flops = 2 * half * case.head_dim * (case.heads // case.kv_heads) * pairs
        return Work(float(seen.sum()) * half * case.head_dim * item + rows, flops)

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """query [S, H, n, D], keys and values [S, K, E, D], contiguous."""
        case = self.case
        pages = self.pool[self.table.view(-1).long()].view(*self.table.shape, 2, PAGE, case.head_dim)
        keys, values = (pages[:, :, :, half].flatten(2, 3)[:, :, : case.context].contiguous() for half in (0, 1))
        query = self.query.view(case.sequences, case.new, case.heads, case.head_dim).transpose(1, 2)
        return query.contiguous(), keys, values


def sdpa(batch: Batch) -> Callable[[], object]:
    """torch's own attention over dense keys and values, grouped heads without copies."""
    query, keys, values = batch.dense()
    causal = batch.case.new == batch.case.context
    if batch.case.new > 1 and not causal:
        raise NotImplementedError("causal at the lower right needs a dense mask")
    return lambda: F.scaled_dot_product_attention(query, keys, values, is_causal=causal, scale=0.1, enable_gqa=True)


def xformers(batch: Batch) -> Callable[[], object]:
    """xformers' memory-efficient attention over dense keys and values."""
    ops = importlib.import_module("xformers.ops")
    query, keys, values = (x.transpose(1, 2) for x in batch.dense())
    case = batch.case
    group = case.heads // case.kv_heads
    shape = (case.sequences, -1, case.kv_heads, group, case.head_dim)
    query = query.reshape(shape)
    keys, values = (x[:, :, :, None].expand(-1, -1, -1, group, -1) for x in (keys, values))
    bias = ops.fmha.attn_bias.LowerTriangularFromBottomRightMask() if case.new > 1 else None
    return lambda: ops.memory_efficient_attention_forward(query, keys, values, attn_bias=bias, scale=0.1)


def flashinfer(batch: Batch) -> Callable[[], object]:
    """FlashInfer over its own pages, which hold all heads of a layer."""
    library = importlib.import_module("flashinfer")
    case, device = batch.case, batch.pool.device
    pages = -(-case.context // PAGE)
    shape = (case.sequences * pages, 2, case.kv_heads, PAGE, case.head_dim)
    cache = torch.randn(shape, device=device, dtype=batch.pool.dtype)
    counts = torch.arange(case.sequences + 1, dtype=torch.int32, device=device)
    index = torch.randperm(len(cache), device=device).int()
    last = torch.full((case.sequences,), (case.context - 1) % PAGE + 1, dtype=torch.int32, device=device)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    sizes = (case.heads, case.kv_heads, case.head_dim, PAGE)
    types = {"q_data_type": cache.dtype, "kv_data_type": cache.dtype}
    if case.new == 1:
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        wrapper.plan(counts * pages, index, last, *sizes, **types)
    else:
        wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        wrapper.plan(counts * case.new, counts * pages, index, last, *sizes, causal=True, **types)
    return lambda: wrapper.run(batch.query, cache)


def xformers_backend(batch: Batch) -> Callable[[], object]:
    """Quire's backend xformers: over the pages, gathering included."""
    case = batch.case
    return partial(paged_attention, **batch.arguments(), value_dim=case.head_dim, backend="xformers")


CONTENDERS = {
    "torch SDPA": sdpa,
    "xformers": xformers,
    "quire, xformers": xformers_backend,
    "FlashInfer": flashinfer,
}
_NEEDS = {"xformers": "xformers", "quire, xformers": "xformers", "FlashInfer": "flashinfer"}


def rows(meter: Meter, cases: tuple[Case, ...], dtype: torch.dtype) -> Iterator[Row]:
    """Every case, by every contender that is installed; contenders do not prune."""
    for case in cases:
        batch = Batch(case, meter.device, dtype)
        run = partial(paged_attention_triton, **batch.arguments(), value_dim=case.head_dim, visible=batch.masks())
        yield meter.row("attention", case.name, "quire", run, batch.work())
        if 1 < case.new <= _MOST_DRAFTED:
            run = partial(run, query_lengths=None)
            yield meter.row("attention", case.name, "quire, lengths on the device", run, batch.work())
        if not case.is_plain:
            continue
        for name, make in CONTENDERS.items():
            if name not in _NEEDS or importlib.util.find_spec(_NEEDS[name]):
                yield _contender(meter, name, make, batch)


def _contender(meter: Meter, name: str, make: Callable[[Batch], Callable[[], object]], batch: Batch) -> Row:
    """A contender's row; one that cannot take the case says why."""
    try:
        run = make(batch)
    except Exception as error:  # other people's interfaces change
        return Row("attention", batch.case.name, name, None, note=f"{type(error).__name__}: {str(error)[:120]}")
    return meter.row("attention", batch.case.name, name, run, batch.work())


def mass_rows(meter: Meter, cases: tuple[Case, ...], dtype: torch.dtype) -> Iterator[Row]:
    """Attention mass of decodes, and of the last 32 rows of prompts."""
    for case in cases:
        if not case.is_plain or case.context > 32768:
            continue
        batch = Batch(case, meter.device, dtype)
        arguments = batch.arguments()
        sums = torch.empty(batch.query.shape[:2], device=meter.device)
        paged_attention_triton(**arguments, value_dim=case.head_dim, log_sums=sums)
        observe = min(32, case.new)
        whole = batch.work(keys_only=True)
        run = partial(attention_mass_triton, **arguments, log_sums=sums, observe=observe)
        least = Work(whole.num_bytes, whole.flops * observe / case.new)
        yield meter.row("attention mass", f"{case.name}, {observe} rows", "quire", run, least)
        yield _columns_row(meter, batch, observe)


def _columns_row(meter: Meter, batch: Batch, observe: int) -> Row:
    """The same of the first sequence alone, for rows whose log-sums nobody has kept."""
    case, pages = batch.case, (batch.pool[:, 0], batch.entry_positions)
    rows = slice(case.new - observe, case.new)
    keys, places = (PagedRows(part, batch.table[0], case.context) for part in pages)
    lengths = batch.kept[0] + case.new
    arguments = (batch.query[rows], keys, places, lengths, batch.positions[rows])
    run = partial(attention_columns_triton, *arguments, reduce="sum", scale=0.1)
    entries = case.context * case.kv_heads * case.head_dim
    work = Work(2 * entries * batch.pool.itemsize, 4 * observe * entries * case.heads // case.kv_heads)
    return meter.row("attention mass", f"{case.name}, columns of {observe} rows of one", "quire", run, work)
