"""Append and attention on the CPU, over cpu_attention.cpp: planned once per step, called once per layer."""

import torch
from torch import Tensor

from .cpu_library import AttentionArgs, loaded_library

_NO_WINDOW_FROM = 2**30
"""A window beyond every position is none."""
_TABLE_BYTES = 4
"""Of an entry of the tables, int32."""


class PagedStep:
    """What all layers of one step share, ready as C arguments. Arguments as in `kernels.attention`, for all L layers.

    page_table [S, L, K, M] and kept [S, L, K] int32, the last axis contiguous. Keeps the tensors alive. `args` has all
    but what a layer brings; its tables are those of the first layer.
    """

    def __init__(
        self,
        pool: Tensor,
        entry_positions: Tensor,
        page_table: Tensor,
        kept: Tensor,
        query_start: Tensor,
        positions: Tensor,
        visible: Tensor | None = None,
    ) -> None:
        self._function = loaded_library().attention
        self._pool = pool
        self._table = page_table if page_table.stride(3) == 1 else page_table.contiguous()
        self._kept = kept if kept.stride(2) == 1 else kept.contiguous()
        self._tensors = (entry_positions, query_start, positions, visible)
        self._threads = torch.get_num_threads()
        self._is_bf16 = int(pool.dtype == torch.bfloat16)
        self._table_pointer, self._kept_pointer = self._table.data_ptr(), self._kept.data_ptr()
        self.table_layer, self.kept_layer = self._table.stride(1), self._kept.stride(1)
        """Elements from one layer's tables to the next."""
        self.args = AttentionArgs(
            pool=pool.data_ptr(),
            entry_positions=entry_positions.data_ptr(),
            page_table=self._table_pointer,
            kept=self._kept_pointer,
            query_start=query_start.data_ptr(),
            positions=positions.data_ptr(),
            visible=None if visible is None else visible.data_ptr(),
            table_sequence=self._table.stride(0),
            table_head=self._table.stride(2),
            kept_sequence=self._kept.stride(0),
            sequences=page_table.shape[0],
            kv_heads=page_table.shape[2],
            width=pool.shape[3],
            page_size=pool.shape[2],
        )

    def append_and_attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """`append_kv` and `paged_attention` of one layer: query [T, H, D], key [T, K, D], value [T, K, Dv]."""
        key, value = _packed_heads(key.to(self._pool.dtype)), _packed_heads(value.to(self._pool.dtype))
        args = self.args
        args.key, args.key_stride = key.data_ptr(), key.stride(0)
        args.value, args.value_stride = value.data_ptr(), value.stride(0)
        return self._run(layer, query, value.shape[2], scale, window, softcap, sinks, append=True)

    def attend(
        self,
        layer: int,
        query: Tensor,
        *,
        value_dim: int,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """`paged_attention` of one layer whose new entries are stored already."""
        return self._run(layer, query, value_dim, scale, window, softcap, sinks, append=False)

    def _run(
        self,
        layer: int,
        query: Tensor,
        value_dim: int,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
        *,
        append: bool,
    ) -> Tensor:
        query = _packed_heads(query)
        tokens, heads, _ = query.shape
        output = torch.empty((tokens, heads, value_dim), dtype=query.dtype)
        sinks = None if sinks is None else sinks.float().contiguous()
        args = self.args
        args.query, args.query_stride, args.output = query.data_ptr(), query.stride(0), output.data_ptr()
        args.sinks = None if sinks is None else sinks.data_ptr()
        args.page_table = self._table_pointer + layer * self.table_layer * _TABLE_BYTES
        args.kept = self._kept_pointer + layer * self.kept_layer * _TABLE_BYTES
        args.heads, args.value_width, args.scale = heads, value_dim, scale
        args.softcap = softcap or 0.0
        args.window = window_argument(window)
        self._function(args, append, True, self._is_bf16, self._threads)
        return output


def window_argument(window: int | None) -> int:
    """As the C++ kernels take it."""
    return window if window and window < _NO_WINDOW_FROM else 0


def _packed_heads(rows: Tensor) -> Tensor:
    """`rows` [T, N, D] with each row's heads in one piece; rows may lie apart."""
    return rows if rows.stride(2) == 1 and rows.stride(1) == rows.shape[2] else rows.contiguous()


def paged_attention_cpu(
    query: Tensor,
    pool: Tensor,
    entry_positions: Tensor,
    page_table: Tensor,
    kept: Tensor,
    query_start: Tensor,
    query_lengths: tuple[int, ...],
    positions: Tensor,
    *,
    max_kept: int,
    value_dim: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """See `kernels.attention.paged_attention`; query and pool of the same type, float32 or bfloat16."""
    tables = (page_table[:, None], kept[:, None])
    step = PagedStep(pool, entry_positions, *tables, query_start, positions, visible)
    return step.attend(0, query, value_dim=value_dim, scale=scale, window=window, softcap=softcap, sinks=sinks)
