"""Attention over the paged KV cache: the contract, and the choice of an implementation.

Letters: T new tokens of the step, S sequences, H query heads, K kv heads, G = H / K query heads per kv head, D head
dim, B entries of a page, P pages of the pool, M pages of the longest head; n new tokens of one sequence.

Contract (every implementation): an entry of head (s, k) takes part if its index is below kept[s, k] + n, its stored
logical position p is at most the query's position i and, with a window, i - p < window. Positions come from
`entry_positions` alone: a pruned head's entries are not consecutive. Heads may hold different numbers of entries.
Nothing of another sequence's pages reaches the result, not even through 0 * NaN. Scores are scale * q.k, then
softcap * tanh(s / softcap) if given; a sink is one more logit of its query head that takes mass but has no value.
A row may carry a mask of its sequence's new rows, as verifying a tree of drafts asks for (Miao et al. 2024, SpecInfer):
bit j says whether it sees row j. A mask only takes away: it names the row itself and rows before it whose positions are
lower. Rows with a mask are among the first 64 of their sequence; a mask of 0 is none. Old entries are seen as ever.
Softmax and accumulation are in float32. Per sequence and entry held: 4 * n * H * D FLOPs, 2 * K * D * itemsize bytes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .attention_cpu import paged_attention_cpu
from .attention_reference import paged_attention_reference
from .attention_xformers import expressible, paged_attention_xformers
from .backend import TRITON_BACKENDS, Backend
from .cpu_library import DTYPES


def paged_attention(
    query: Tensor,
    pool: Tensor,
    entry_positions: Tensor,
    page_table: Tensor,
    kept: Tensor,
    query_start: Tensor,
    query_lengths: tuple[int, ...] | None,
    positions: Tensor,
    *,
    max_kept: int,
    value_dim: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    table_rows: Tensor | None = None,
    visible: Tensor | None = None,
    log_sums: Tensor | None = None,
    backend: Backend = "reference",
) -> Tensor:
    """Causal attention of one layer, after `append_kv` stored the new entries at indices kept .. kept + n - 1.

    query [T, H, D] (query head h uses kv head h // G); pool [P, 2, B, D], contiguous, read in query's dtype;
    entry_positions [P, B] int32; page_table [S, K, M] int32, columns past a head's length are arbitrary; kept [S, K]
    int32, before this step; query_start [S + 1] int32: first row of each sequence (device twin of `query_lengths`,
    which may be None where the host does not know them: triton then takes any, also 0, all others read the device);
    positions [T] int64; max_kept: host upper bound of kept + n; sinks [H]. With table_rows [S] int64, page_table
    [N, K, M] and kept [N, K] are those of N slots, and sequence s has row table_rows[s] of them: for triton no copy is
    made. visible [T] int64: the rows' masks; None: no row has one. Returns [T, H, value_dim] in query's dtype. Mutates
    nothing but log_sums [T, H] float32, which triton alone takes (xformers leaves that to it): it gets the natural
    log of what each row's exponentiated scores, sinks included, sum to. Raises `ValueError` or `TypeError`, naming the
    tensor, where shapes or types disagree.
    """
    if log_sums is not None and backend not in TRITON_BACKENDS:
        raise ValueError(f"log_sums must be None with the backend {backend}: triton alone keeps them")
    by_xformers = (
        backend == "xformers"
        and log_sums is None
        and expressible(query, pool, value_dim=value_dim, window=window, softcap=softcap, sinks=sinks, visible=visible)
    )
    if backend in TRITON_BACKENDS and not by_xformers:
        from .attention_triton import paged_attention_triton  # triton is installed beside a GPU only

        return paged_attention_triton(
            query, pool, entry_positions, page_table, kept, query_start, query_lengths, positions, max_kept=max_kept,
            value_dim=value_dim, scale=scale, window=window, softcap=softcap, sinks=sinks, table_rows=table_rows,
            visible=visible, log_sums=log_sums,
        )  # fmt: skip
    if table_rows is not None:
        page_table, kept = page_table[table_rows], kept[table_rows]
    check_paged(pool, entry_positions, page_table, kept, query_start, positions, visible)
    check_query(query, pool, page_table, positions, value_dim=value_dim, window=window, sinks=sinks)
    if query_lengths is None:
        query_lengths = tuple(query_start.diff().tolist())
    if by_xformers:
        return paged_attention_xformers(
            query, pool, entry_positions, page_table, kept, query_lengths, max_kept=max_kept, scale=scale
        )
    compute: Callable[..., Tensor] = paged_attention_reference
    # The C++ kernels read the pool as it is; a model that asks in another type than it stores is the reference's.
    if backend == "cpu" and query.dtype == pool.dtype and pool.dtype in DTYPES:
        compute = paged_attention_cpu
    return compute(
        query,
        pool,
        entry_positions,
        page_table,
        kept,
        query_start,
        query_lengths,
        positions,
        max_kept=max_kept,
        value_dim=value_dim,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        visible=visible,
    )


def check_paged(
    pool: Tensor,
    entry_positions: Tensor,
    page_table: Tensor,
    kept: Tensor,
    query_start: Tensor,
    positions: Tensor,
    visible: Tensor | None = None,
) -> None:
    """Raise where the tensors that all layers of a step share disagree; table [S, ..., K, M] and kept [S, ..., K]."""
    if pool.dim() != 4 or pool.shape[1] != 2 or not pool.is_contiguous():
        raise ValueError(f"pool must be contiguous [P, 2, B, D], got {list(pool.shape)}, strides {pool.stride()}")
    if entry_positions.shape != (pool.shape[0], pool.shape[2]):
        raise ValueError(
            f"entry_positions must be [P, B] of pool {list(pool.shape)}, got {list(entry_positions.shape)}"
        )
    if kept.shape != page_table.shape[:-1]:
        raise ValueError(f"kept must be {list(page_table.shape[:-1])} as the page table, got {list(kept.shape)}")
    if query_start.shape != (page_table.shape[0] + 1,):
        raise ValueError(f"query_start must be [{page_table.shape[0] + 1}], got {list(query_start.shape)}")
    if visible is not None and (visible.shape != positions.shape or not visible.is_contiguous()):
        raise ValueError(f"visible must be contiguous {list(positions.shape)}, got {list(visible.shape)}")
    for name, tensor, dtype in (
        ("entry_positions", entry_positions, torch.int32),
        ("page_table", page_table, torch.int32),
        ("kept", kept, torch.int32),
        ("query_start", query_start, torch.int32),
        ("positions", positions, torch.int64),
        ("visible", visible, torch.int64),
    ):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
        if tensor.device != pool.device:
            raise ValueError(f"{name} must be on {pool.device} as the pool, got {tensor.device}")


def check_query(
    query: Tensor,
    pool: Tensor,
    page_table: Tensor,
    positions: Tensor,
    *,
    value_dim: int,
    window: int | None,
    sinks: Tensor | None,
) -> None:
    """Raise where one layer's arguments do not fit the step's."""
    heads, kv_heads, width = query.shape[1], page_table.shape[-2], pool.shape[3]
    if query.shape != (positions.shape[0], heads, width) or heads % kv_heads:
        raise ValueError(
            f"query must be [{positions.shape[0]}, a multiple of {kv_heads}, {width}], got {list(query.shape)}"
        )
    if not 1 <= value_dim <= width:
        raise ValueError(f"value_dim must be within 1 and {width}, got {value_dim}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks must be [{heads}], got {list(sinks.shape)}")
