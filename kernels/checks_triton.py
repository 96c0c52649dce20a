"""Checks that the launch wrappers of the Triton kernels share; each raises naming the tensor, what it wants and got.

They read shapes, strides and types only, which live on the host: a launch never waits for the device.
"""

from torch import Tensor, device, dtype, int32, int64

INDEX_TYPES = (int32, int64)


def check_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """Raise `ValueError` unless the shape is `shape`; None stands for any size."""
    if tensor.dim() != len(shape) or any(w is not None and w != g for w, g in zip(shape, tensor.shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")


def check_dtype(name: str, tensor: Tensor, *allowed: dtype) -> None:
    """Raise `TypeError` unless the type is one of `allowed`."""
    if tensor.dtype not in allowed:
        wanted = " or ".join(str(kind).removeprefix("torch.") for kind in allowed)
        raise TypeError(f"{name} must be {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_float(name: str, tensor: Tensor) -> None:
    """Raise `TypeError` unless the tensor holds floating-point numbers."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {str(tensor.dtype).removeprefix('torch.')}")


def check_contiguous(name: str, tensor: Tensor) -> None:
    """Raise `ValueError` unless the tensor is contiguous."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())} of {list(tensor.shape)}")


def check_rows(name: str, tensor: Tensor) -> None:
    """Raise `ValueError` unless neighbours along the last axis are neighbours in memory."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must have stride 1 along its last axis, got {tensor.stride(-1)}")


def check_device(where: device, **tensors: Tensor | None) -> None:
    """Raise `ValueError` unless all given tensors are on `where`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != where:
            raise ValueError(f"{name} must be on {where}, got {tensor.device}")


def check_pool(pool: Tensor, entry_positions: Tensor) -> None:
    """Raise unless pool is [P, 2, B, D] floating point and entry_positions [P, B] int32, both contiguous."""
    check_shape("pool", pool, (None, 2, None, None))
    check_float("pool", pool)
    check_contiguous("pool", pool)
    check_shape("entry_positions", entry_positions, (pool.shape[0], pool.shape[2]))
    check_dtype("entry_positions", entry_positions, int32)
    check_contiguous("entry_positions", entry_positions)


def check_step(
    query: Tensor,
    pool: Tensor,
    page_table: Tensor,
    kept: Tensor,
    query_start: Tensor,
    query_lengths: tuple[int, ...] | None,
    positions: Tensor,
    slots: int | None = None,
) -> None:
    """Raise unless these are the tensors of one step; `slots`: rows of page_table and kept, None: the sequences."""
    sequences = len(query_start) - 1 if query_lengths is None else len(query_lengths)
    check_shape("query", query, (None, None, pool.shape[3]))
    check_float("query", query)
    check_rows("query", query)
    check_shape("page_table", page_table, (sequences if slots is None else slots, None, None))
    check_rows("page_table", page_table)
    check_shape("kept", kept, tuple(page_table.shape[:2]))
    for name, tensor in (("page_table", page_table), ("kept", kept)):
        check_dtype(name, tensor, int32)
    check_shape("query_start", query_start, (sequences + 1,))
    check_shape("positions", positions, (query.shape[0],))
    for name, tensor in (("query_start", query_start), ("positions", positions)):
        check_dtype(name, tensor, *INDEX_TYPES)
        check_contiguous(name, tensor)
    if query.shape[1] % page_table.shape[1]:
        raise ValueError(f"query has {query.shape[1]} heads, no multiple of page_table's {page_table.shape[1]}")
    if query_lengths is not None and sum(query_lengths) != query.shape[0]:
        raise ValueError(f"query_lengths must add up to query's {query.shape[0]} rows, got {sum(query_lengths)}")
    check_device(
        query.device, pool=pool, page_table=page_table, kept=kept, query_start=query_start, positions=positions
    )
