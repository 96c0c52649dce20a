"""Import this before anything of Triton: without a GPU it switches Triton's interpreter on while kernels are defined.

Triton decides when a kernel is defined, that is, when its module is imported, whether it will be compiled or
interpreted, its own library included. pytest sets `TRITON_INTERPRET` before anything else (`tests/conftest.py`); other
programs that import this get it for the imports here.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from quire.kernels import (
    append_rotated_triton,
    attention_columns_triton,
    attention_mass_triton,
    attention_triton,
    cache_triton,
    compaction_triton,
    cuts_triton,
    layers_triton,
    logprobs_triton,
    page_bounds_triton,
    rejection_triton,
    rows_triton,
    sampling_triton,
)

from .oracle import PagedCase

ON_GPU = torch.cuda.is_available()
DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu)] if ON_GPU else [pytest.param("cpu")]
"""Where the tests of this folder run their kernels: on the GPU, or interpreted on the CPU."""
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU
"""The interpreter multiplies bfloat16 matrices wrongly, and cuts numbers off where it should round them to it."""

__all__ = [
    "DEVICES",
    "DTYPES",
    "ON_GPU",
    "append_rotated_triton",
    "attention_arguments",
    "attention_columns_triton",
    "attention_mass_triton",
    "attention_triton",
    "cache_triton",
    "compaction_triton",
    "cuts_triton",
    "layers_triton",
    "log_sum_arguments",
    "logprobs_triton",
    "page_bounds_triton",
    "rejection_triton",
    "rows_triton",
    "sampling_triton",
    "to_device",
    "tolerance",
    "widened",
]


def _allow_new_numpy() -> None:
    """Triton 3.6 keeps scalars as arrays of one element, which NumPy 2.4 no longer takes for numbers."""
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch


if not ON_GPU:
    _allow_new_numpy()


def to_device(case: PagedCase, device: str) -> PagedCase:
    """The case with all its tensors there."""
    fields: dict[str, Any] = {name: value.to(device) for name, value in vars(case).items() if isinstance(value, Tensor)}
    return replace(case, **fields)


def widened(case: PagedCase) -> PagedCase:
    """The case in float32: what an exact result is computed from."""
    return replace(case, pool=case.pool.float(), query=case.query.float(), key=case.key.float())


def attention_arguments(case: PagedCase) -> dict[str, Any]:
    """The arguments of `paged_attention` that tell the batch and the cache."""
    names = ("query", "pool", "entry_positions", "page_table", "kept", "query_lengths", "positions")
    return {name: getattr(case, name) for name in names} | {"query_start": case.query_start.to(case.pool.device)}


def log_sum_arguments(case: PagedCase) -> dict[str, Any]:
    """The same for `attention_log_sums`."""
    return {name: value for name, value in attention_arguments(case).items() if name != "query_start"}


def tolerance(dtype: torch.dtype) -> dict[str, Any]:
    """Of results of size 1: float32 sums differ in order; 16-bit types round weights and output (2**-11 or 2**-8)."""
    if dtype == torch.float32:
        return {"rtol": 1e-4, "atol": 2e-5}
    return {"rtol": 2e-3, "atol": 2e-3} if dtype == torch.float16 else {"rtol": 2e-2, "atol": 1e-2}
