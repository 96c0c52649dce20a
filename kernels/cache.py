"""Writing into the paged KV cache: the contract, and the choice of an implementation.

A page holds B entries (key, value, logical position) of ONE kv head of ONE layer. Letters: T new tokens of the step,
S sequences, L layers, K kv heads, D head dim, B entries of a page, P pages of the pool, M pages of the longest head.
The functions are pure but for what their docstring says they mutate; they know no requests and no owners of pages.
On a CPU the C++ kernels append inside the call that attends, see `kernels.attention_cpu`.
"""

import math

import numpy as np
import torch
from torch import Tensor

from .backend import TRITON_BACKENDS, Backend
from .cache_reference import append_kv_reference

_ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector of a CPU."""


def row_sequences(query_start: Tensor, num_tokens: int) -> Tensor:
    """Which sequence each row of the flattened batch belongs to.

    query_start [S + 1] int: first row of each sequence, then T = `num_tokens`. Returns [T] int64; never syncs.
    """
    lengths = query_start.diff()
    sequences = torch.arange(lengths.shape[0], device=query_start.device)
    return torch.repeat_interleave(sequences, lengths, output_size=num_tokens)


def entry_destinations(
    page_table: Tensor, kept: Tensor, query_start: Tensor, *, page_size: int, num_tokens: int
) -> Tensor:
    """Where each new token's key and value go, for all layers and heads at once.

    page_table [S, L, K, M] int32: pages of each head in order, reaching past the new entries; kept [S, L, K] int32:
    entries each head holds before the step; query_start [S + 1] int. Row t of sequence s, its o-th new one, becomes
    entry kept[s, l, k] + o of head (l, k). Returns [L, T, K] int64: page * B + offset in page. Reads and writes
    about 16 * L * T * K bytes; never syncs.
    """
    sequence = row_sequences(query_start, num_tokens)
    order = torch.arange(num_tokens, device=page_table.device) - query_start[sequence]
    return row_destinations(page_table, kept, sequence, order, page_size=page_size)


def row_destinations(page_table: Tensor, kept: Tensor, sequence: Tensor, order: Tensor, *, page_size: int) -> Tensor:
    """`entry_destinations` of any tokens: the order[T]-th new ones, int64, of the sequences [T] int64.

    The tables may be those of all slots, and `sequence` name slots. No shape depends on a length: a CUDA graph can
    hold it.
    """
    num_sequences, num_layers, num_heads, num_columns = page_table.shape
    index = kept[sequence].long().add_(order[:, None, None])  # [T, L, K]
    heads = torch.arange(num_sequences * num_layers * num_heads, device=page_table.device)
    # Gathering single table cells, not rows of M: a long context's rows would be megabytes per token.
    first_cell = (heads * num_columns).view(num_sequences, num_layers, num_heads)[sequence]
    page = page_table.reshape(-1)[first_cell + index.div(page_size, rounding_mode="floor")].long()
    return page.mul_(page_size).add_(index.remainder_(page_size)).transpose(0, 1).contiguous()


def append_kv(
    pool: Tensor,
    entry_positions: Tensor,
    key: Tensor,
    value: Tensor,
    destinations: Tensor,
    positions: Tensor,
    backend: Backend = "reference",
) -> None:
    """Store one layer's new keys and values, and their logical positions, in place.

    pool [P, 2, B, D] any float dtype, contiguous, mutated: keys at [:, 0], values at [:, 1]; entry_positions [P, B]
    int32, contiguous, mutated; key [T, K, D] (already rotated), value [T, K, Dv <= D], cast to the pool's dtype
    (columns Dv.. of the stored values are left alone); destinations [T, K] int64, all different; positions [T]
    int64. Writes T * K * (D + Dv) elements; no arithmetic.
    Raises `ValueError` where shapes disagree.
    """
    if key.shape[:2] != destinations.shape or key.shape[2:] != pool.shape[3:]:
        raise ValueError(f"key must be {[*destinations.shape, pool.shape[3]]}, got {list(key.shape)}")
    if value.shape[:2] != destinations.shape or value.shape[2] > pool.shape[3]:
        raise ValueError(
            f"value must be {list(destinations.shape)} and at most {pool.shape[3]}, got {list(value.shape)}"
        )
    if backend in TRITON_BACKENDS:
        from .cache_triton import append_kv_triton  # triton is installed beside a GPU only

        append_kv_triton(pool, entry_positions, key, value, destinations, positions)
    else:
        append_kv_reference(pool, entry_positions, key, value, destinations, positions)


def move_entries(pool: Tensor, entry_positions: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Entries `targets` become what entries `sources` are: key, value and position. Mutates pool and entry_positions.

    sources, targets [N] int64: page * B + offset, as of `entry_destinations`; no two targets are the same. A target may
    be another's source: all is read before anything is written. Moves N * 2 * D elements of pool [P, 2, B, D].
    """
    size = pool.shape[2]
    page, place = sources.div(size, rounding_mode="floor"), sources % size
    moved, positions = pool[page, :, place], entry_positions[page, place]
    page, place = targets.div(size, rounding_mode="floor"), targets % size
    pool[page, :, place], entry_positions[page, place] = moved, positions


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros; on a CPU its memory is taken from the system page by page as it is written.

    `torch.zeros` writes every byte, so a large pool would delay the start and be resident before it is used.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    memory = torch.from_numpy(np.zeros(size + _ALIGNMENT, np.uint8))
    first = -memory.data_ptr() % _ALIGNMENT
    return memory[first : first + size].view(dtype).view(shape)
