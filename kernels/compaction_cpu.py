"""`compact_kv` by the C++ kernel: each entry is read and written once, and what stays where it is not at all."""

import torch
from torch import Tensor

from .cpu_library import loaded_library


def compact_kv_cpu(
    pool: Tensor,
    entry_positions: Tensor,
    source_table: Tensor,
    target_table: Tensor,
    keep: Tensor,
    counts: Tensor,
    *,
    in_place: bool,
) -> None:
    """`kernels.compaction_reference.compact_kv` on a CPU, for a pool of any dtype; mutates pool and entry_positions.

    Raises `ValueError` naming the tensor whose shape, type or strides the kernel cannot read.
    """
    heads = len(source_table)
    indices = {"source_table": source_table, "target_table": target_table, "keep": keep}
    for name, tensor in indices.items():
        if tensor.shape[0] != heads or tensor.dtype != torch.int32 or tensor.stride(1) != 1:
            raise ValueError(f"{name} must be [{heads}, ...] int32 with rows in one piece, got {list(tensor.shape)}")
    if counts.shape != (heads,) or counts.dtype != torch.int32 or not counts.is_contiguous():
        raise ValueError(f"counts must be [{heads}] int32, contiguous, got {list(counts.shape)} {counts.dtype}")
    if not (pool.is_contiguous() and entry_positions.is_contiguous() and entry_positions.dtype == torch.int32):
        raise ValueError("pool and entry_positions must be contiguous, the positions int32")
    tensors = (pool, entry_positions, source_table, target_table, keep, counts)
    strides = (tensor.stride(0) for tensor in indices.values())
    row_bytes = pool.shape[3] * pool.element_size()
    pointers = (tensor.data_ptr() for tensor in tensors)
    loaded_library().compact(*pointers, *strides, heads, pool.shape[2], row_bytes, torch.get_num_threads())
