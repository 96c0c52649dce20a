"""`TargetCache`: what a drafter that shares the target's KV pages may know of them."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..core.plan import IntArray


class TargetCache(Protocol):
    """The target model's paged cache, fulfilled by `engine.cache.KVCache`. Letters as in `models.context`."""

    pool: Tensor
    """[P, 2, B, D]: keys (0) and values (1)."""
    entry_positions: Tensor
    """[P, B] int32: logical position of each entry."""

    def longest(self, slots: IntArray, lengths: Sequence[int]) -> int:
        """Entries of the longest head once each of the slots [S] has got `lengths` more."""
        ...

    def rotary_starts(self, slots: IntArray, starts: IntArray) -> IntArray:
        """Where the next entries of the slots [S] are rotated to, by their logical positions `starts` [S]."""
        ...

    def tables(self, slots: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Copies of the slots' page tables [S, L, K, M] int32, M pages holding `longest` entries, and of their kept
        lengths [S, L, K] int32."""
        ...
