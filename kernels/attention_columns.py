"""How much attention each entry of one sequence gets from given rows: the contract, and the choice of a kernel.

`kernels.attention_mass_triton` does the same from pages, given the rows' log-sums. Letters: n rows, H query heads, K kv
heads, G = H / K, D head dim, E entries of the longest head.
"""

from typing import Literal

import torch
from torch import Tensor

from .backend import TRITON_BACKENDS, Backend
from .cpu_library import DTYPES, loaded_library
from .paged_rows import PagedRows

MAX_WEIGHTS = 1 << 22
"""Most weights that exist at a time (16 MiB of float32): rows are taken in slices, never all against all."""
_PARTS, _COLUMNS = 4, 16
"""Shares of the rows that the C++ kernel computes on their own, so that few heads occupy many threads; and the rows and
heads of a group that make a share worth while: what it multiplies at once."""


def attention_columns(
    query: Tensor,
    keys: PagedRows,
    entry_positions: PagedRows,
    lengths: Tensor,
    positions: Tensor,
    *,
    reduce: Literal["sum", "max"],
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: Backend = "reference",
) -> Tensor:
    """[K, E] float32: the probability that the rows give each entry, summed (or the greatest) over rows and group.

    query [n, H, D] at positions [n], n = 0 if nothing was seen yet; keys [K, E, D], their rows' own included;
    entry_positions [K, E] int32, ascending; lengths [K]: what lies past them counts for nothing, whatever it holds;
    sinks [H]: logits without an entry. Softmax in float32.
    2 * n * H * E * D FLOPs at most.
    """
    if backend == "cpu" and len(query) and keys.pages.dtype == query.dtype and query.dtype in DTYPES:
        return _columns_cpu(query, keys, entry_positions, lengths, positions, reduce, scale, softcap, sinks)
    compute = attention_columns_reference
    if backend in TRITON_BACKENDS:
        from .attention_columns_triton import attention_columns_triton as compute  # triton is there beside a GPU only
    return compute(
        query, keys, entry_positions, lengths, positions, reduce=reduce, scale=scale, softcap=softcap, sinks=sinks
    )


def attention_columns_reference(
    query: Tensor,
    keys: PagedRows,
    entry_positions: PagedRows,
    lengths: Tensor,
    positions: Tensor,
    *,
    reduce: Literal["sum", "max"],
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `attention_columns`; on any device."""
    held = entry_positions.read()
    rows, heads, width = query.shape
    kv_heads, longest = len(keys.table), keys.entries
    group = heads // kv_heads
    missing = torch.arange(longest, device=query.device) >= lengths[:, None]
    transposed = keys.read().float().masked_fill(missing[..., None], 0.0).transpose(1, 2)
    folded = query.view(rows, kv_heads, group, width).transpose(0, 1)
    result = torch.zeros(kv_heads, longest, device=query.device)
    step = max(1, MAX_WEIGHTS // (heads * longest))
    for first in range(0, rows, step):
        part = folded[:, first : first + step]
        hidden = missing[:, None] | (held[:, None] > positions[first : first + step, None])
        logits = torch.bmm(part.flatten(1, 2).float(), transposed).mul_(scale).unflatten(1, part.shape[1:3])
        weights = _weights(logits, hidden, softcap, sinks)
        if reduce == "sum":
            result += weights.sum((1, 2))
        else:
            result = torch.maximum(result, weights.amax((1, 2)))
    return result


def _columns_cpu(
    query: Tensor,
    keys: PagedRows,
    entry_positions: PagedRows,
    lengths: Tensor,
    positions: Tensor,
    reduce: Literal["sum", "max"],
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """By cpu_scores.cpp; products of bfloat16 numbers are exact, sums float32."""
    (rows, heads, width), (kv_heads, entries) = query.shape, (len(keys.table), keys.entries)
    query = query if query[0].is_contiguous() else query.contiguous()
    positions, lengths = positions.int().contiguous(), lengths.long().contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    parts = min(_PARTS, -(-rows * heads // (kv_heads * _COLUMNS)))
    output = torch.empty(kv_heads, entries)
    loaded_library().attention_columns(
        query.data_ptr(),
        keys.arguments(),
        entry_positions.arguments(),
        *(tensor.data_ptr() for tensor in (positions, lengths)),
        None if sinks is None else sinks.data_ptr(),
        output.data_ptr(),
        *(query.stride(0), rows, heads, kv_heads, entries, width, parts),
        *(scale, softcap or 0.0, reduce == "max", query.dtype == torch.bfloat16, torch.get_num_threads()),
    )
    return output


def _weights(logits: Tensor, hidden: Tensor, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Probabilities [K, n, G, E] of logits (overwritten), with hidden [K, n, E] and sinks [H]."""
    kv_heads, rows, group, entries = logits.shape
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    logits.masked_fill_(hidden[:, :, None], float("-inf"))
    if sinks is not None:
        column = sinks.float().view(kv_heads, 1, group, 1).expand(-1, rows, -1, -1)
        logits = torch.cat([logits, column], dim=-1)
    return logits.softmax(-1)[..., :entries]
