"""Rotating a step's query and key heads and storing its keys and values: the contract, and the choice of kernels.

It is `kernels.rotary.rotate_heads` of all heads, then `kernels.cache.append_kv` of the key heads: so it is computed but
on a GPU, where one launch does both, and keys go to their pages without being written anywhere else.
"""

from dataclasses import dataclass

from torch import Tensor

from .backend import TRITON_BACKENDS, Backend
from .cache import append_kv
from .rotary import rotate_heads


@dataclass(frozen=True, slots=True)
class Rotation:
    """Heads that are still to be normalised and rotated, and by what; see `kernels.rotary.rotate_heads`."""

    heads: Tensor
    """[T, H + K, D]: the query heads, then the key heads."""
    cos: Tensor
    """[T, R / 2], contiguous."""
    sin: Tensor
    norm_weight: Tensor | None = None
    """[H + K, D]; None: they are not normalised."""
    epsilon: float = 0.0

    def apply(self, backend: Backend) -> None:
        """Rotate all heads in place."""
        rotate_heads(
            self.heads, self.cos, self.sin, norm_weight=self.norm_weight, epsilon=self.epsilon, backend=backend
        )


def append_rotated(
    rotation: Rotation,
    value: Tensor,
    pool: Tensor,
    entry_positions: Tensor,
    destinations: Tensor,
    positions: Tensor,
    backend: Backend = "reference",
) -> None:
    """Rotate the query heads in place, and store the rotated key heads with their values and logical positions.

    value, pool, entry_positions, destinations [T, K] and positions as of `append_kv`. What the key heads hold
    afterwards is left open. Reads T * (H + K) * D + T * K * Dv elements, writes T * H * D + T * K * (D + Dv). Raises
    `ValueError` or `TypeError` where shapes or types disagree.
    """
    if backend in TRITON_BACKENDS:
        from .append_rotated_triton import append_rotated_triton  # triton is installed beside a GPU only

        append_rotated_triton(rotation, value, pool, entry_positions, destinations, positions)
        return
    rotation.apply(backend)
    key = rotation.heads[:, rotation.heads.shape[1] - destinations.shape[1] :]
    append_kv(pool, entry_positions, key, value, destinations, positions, backend)
