"""Rotary position embedding of query and key heads, with or without a norm of each head before: the contract.

The pairs are (i, i + R / 2), the half-split order of Hugging Face checkpoints (Su et al. 2021); entries behind the
leading R of a head stay. Every product is rounded to the heads' dtype, as in the library's modelling code. Letters: T
rows, N heads, D head dim, R <= D rotated entries. Reads and writes the heads once: 2 * T * N * D * itemsize bytes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .backend import Backend
from .cpu_library import loaded_library
from .norm import rms_norm_reference


@dataclass(frozen=True, slots=True)
class Angles:
    """By what the rows of a step are rotated."""

    cos: Tensor
    """[T, R / 2], contiguous; or [P, R / 2], of which `rows` picks."""
    sin: Tensor
    rows: Tensor | None = None
    """[T] int64, each below P."""

    def picked(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of each row, [T, R / 2]."""
        if self.rows is None:
            return self.cos, self.sin
        return self.cos.index_select(0, self.rows), self.sin.index_select(0, self.rows)

    def check(self, rows: int, dtype: torch.dtype, width: int) -> int:
        """R / 2; raises `ValueError` unless these are for so many rows in `dtype` and heads of `width`."""
        cos, half = self.cos, self.cos.shape[1]
        if cos.shape != self.sin.shape or 2 * half > width or cos.dtype != dtype:
            raise ValueError(f"cos and sin must be {dtype} [.., <= {width // 2}], got {cos.dtype} {list(cos.shape)}")
        if len(cos if self.rows is None else self.rows) != rows:
            raise ValueError(f"angles must be of {rows} rows, got {len(cos if self.rows is None else self.rows)}")
        return half


def rotate_heads(
    heads: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    norm_weight: Tensor | None = None,
    epsilon: float = 0.0,
    backend: Backend = "reference",
) -> None:
    """Normalise (with `norm_weight` [N, D] and `epsilon`, see `kernels.norm`) and rotate `heads` [T, N, D] in place.

    cos, sin [T, R / 2], contiguous, of the heads' dtype. A row's heads lie in one piece, rows may lie apart. On a
    GPU this is the reference: `kernels.append_rotated` rotates and stores in one there. Raises `ValueError` where
    shapes disagree.
    """
    _check(heads, cos, sin, norm_weight)
    if backend != "cpu":
        normed = heads if norm_weight is None else rms_norm_reference(heads, norm_weight, epsilon)
        heads.copy_(rotate_reference(normed, cos, sin))
        return
    loaded_library().rotate(
        heads.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        None if norm_weight is None else norm_weight.data_ptr(),
        heads.stride(0),
        *heads.shape,
        cos.shape[1],
        epsilon,
        heads.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )


def _check(heads: Tensor, cos: Tensor, sin: Tensor, norm_weight: Tensor | None) -> None:
    rows, num_heads, width = heads.shape
    if cos.shape != sin.shape or cos.dim() != 2 or len(cos) != rows or 2 * cos.shape[1] > width:
        raise ValueError(f"cos and sin must be [{rows}, at most {width // 2}], got {list(cos.shape)}")
    if norm_weight is not None and norm_weight.shape != (num_heads, width):
        raise ValueError(f"norm_weight must be {[num_heads, width]}, got {list(norm_weight.shape)}")
    if heads.stride(2) != 1 or heads.stride(1) != width:
        raise ValueError(f"each row's heads must lie in one piece, got strides {heads.stride()}")


def rotate_reference(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`heads` [T, N, D] rotated by cos, sin [T, R / 2], as a new tensor."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    first, second = heads[..., :half], heads[..., half : 2 * half]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if 2 * half < heads.shape[-1]:
        parts.append(heads[..., 2 * half :])
    return torch.cat(parts, dim=-1)
