"""Attention over the paged KV cache by xformers: an optional GPU backend behind the contract of `kernels.attention`.

Its masks know sequences of queries over sequences of keys, all heads alike. Here every (sequence, kv head) is such a
sequence of its own, whose G query heads share one key head: so heads may hold different numbers of entries. Its
operators read pages of at least 64 entries only, so pages are gathered side by side first, into a scratch of S * K * E
entries (E: the longest head), which reads and writes what attention then reads once more: three times the bytes of
`triton`'s, two of them for gathering. Not expressible, and left to `triton`: windows (positions of a pruned head are
not its indices), softcap, sinks, masks of rows, sums of logits, values narrower than keys, other types than float16
and bfloat16.

Lengths stay on the device: the mask is built from the host's upper bound, once per batch shape, and each layer's own
lengths take its place. Nothing is imported before the backend is asked for.
"""

import dataclasses
import importlib
import itertools
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .attention_reference import gather_pages

DTYPES = (torch.float16, torch.bfloat16)


@cache
def xformers_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why xformers cannot compute attention for models of `dtype` on `device`, in one line; None if it can.

    Asks it to: an installed xformers may lack its binaries, be built for another torch, or not know the device.
    """
    if device.type != "cuda":
        return f"it needs a GPU, the device is {device.type}"
    if dtype not in DTYPES:
        return f"it computes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    try:
        _attend(torch.zeros(2, 2, 64, device=device, dtype=dtype), *_probe(device, dtype), scale=1.0)
    # Missing package, binaries that do not load, no operator for this device: each raises its own kind.
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason'}"
    return None


def expressible(
    query: Tensor,
    pool: Tensor,
    *,
    value_dim: int,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    visible: Tensor | None,
) -> bool:
    """Whether xformers can compute this call; see the module's docstring."""
    plain = window is None and softcap is None and sinks is None and visible is None and value_dim == pool.shape[3]
    return plain and query.dtype == pool.dtype and query.dtype in DTYPES


def paged_attention_xformers(
    query: Tensor,
    pool: Tensor,
    entry_positions: Tensor,
    page_table: Tensor,
    kept: Tensor,
    query_lengths: tuple[int, ...],
    *,
    max_kept: int,
    scale: float,
) -> Tensor:
    """`kernels.attention.paged_attention` for calls that are `expressible`: [T, H, D]. Never syncs, but for the first
    call of a batch shape, which uploads its mask."""
    totals = kept.reshape(-1).long() + _uploaded(query_lengths, page_table.shape[1], query.device)
    keys, values, _ = gather_pages(pool, entry_positions, page_table, totals, max_kept)
    return _attend(query, keys, values, totals, query_lengths, scale=scale)


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, totals: Tensor, query_lengths: tuple[int, ...], *, scale: float
) -> Tensor:
    """query [T, H, D] over keys, values [S * K, E, D], of which the first `totals` [S * K] count -> [T, H, D]."""
    rows, heads, width = query.shape
    kv_heads = len(keys) // len(query_lengths)
    group = heads // kv_heads
    order, inverse = _row_order(query_lengths, kv_heads, query.device)
    # [T, K, G, D] -> [(s, k, token), G, D]: where each sequence brings one row this is the order they are in.
    folded = query.reshape(rows * kv_heads, group, width)
    folded = folded if order is None else folded[order]
    flat = (x.reshape(1, -1, 1, width).expand(-1, -1, group, -1) for x in (keys, values))
    bias = _bias(query_lengths, kv_heads, keys.shape[1], query.device)
    own = dataclasses.replace(bias.k_seqinfo, seqlen=totals.int())
    bias = dataclasses.replace(bias, k_seqinfo=own)
    forward = _operations().memory_efficient_attention_forward
    result: Tensor = forward(folded[None], *flat, attn_bias=bias, scale=scale)[0]
    return (result if inverse is None else result[inverse]).reshape(rows, heads, width)


@lru_cache(maxsize=32)
def _bias(query_lengths: tuple[int, ...], kv_heads: int, entries: int, device: torch.device) -> Any:
    """The mask of S * K sequences with their new rows over `entries` each, causal at the lower right."""
    masks = importlib.import_module("xformers.ops.fmha.attn_bias")
    lengths = [length for length in query_lengths for _ in range(kv_heads)]
    kind = masks.BlockDiagonalCausalWithOffsetPaddedKeysMask
    return kind.from_seqlens(q_seqlen=lengths, kv_padding=entries, kv_seqlen=[entries] * len(lengths), device=device)


@lru_cache(maxsize=32)
def _row_order(
    query_lengths: tuple[int, ...], kv_heads: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Where the rows (token, k) are in the order (sequence, k, token), and back; None, None if it is the same order."""
    if max(query_lengths) == 1 or kv_heads == 1:
        return None, None
    starts = np.cumsum((0, *query_lengths))
    parts = [
        (np.arange(start, end)[None, :] * kv_heads + np.arange(kv_heads)[:, None]).ravel()
        for start, end in itertools.pairwise(starts)
    ]
    order = torch.from_numpy(np.concatenate(parts))
    return order.to(device), order.argsort().to(device)


@lru_cache(maxsize=32)
def _uploaded(query_lengths: tuple[int, ...], kv_heads: int, device: torch.device) -> Tensor:
    """[S * K] int64: new entries of each head."""
    return torch.tensor(query_lengths).repeat_interleave(kv_heads).to(device)


@cache
def _operations() -> Any:
    return importlib.import_module("xformers.ops")


def _probe(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """Keys, values, totals and lengths of a decode and a chunk of one token each."""
    keys = torch.zeros(2, 16, 64, device=device, dtype=dtype)
    return keys, keys, torch.tensor([3, 16], device=device), (1, 1)
