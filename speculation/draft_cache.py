"""`DraftCache`: the paged KV cache of a draft model, which lends its pages to slots by itself.

A page holds entries of one head of one layer, as in the target's cache, so the same kernels read it; but nothing is
pruned or shared here, all heads of a slot hold equally many entries, and pages come in bundles of one per head. Letters
as in `models.context`; N slots, W bundles that a slot may hold.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core.model_spec import ModelSpec
from ..core.plan import IntArray
from ..kernels.cache import zeros
from ..models.placement import Placement


@dataclass(frozen=True, slots=True)
class DraftLayout:
    """Size of a draft's cache."""

    num_slots: int
    max_length: int
    """Most entries of a slot."""
    page_size: int
    """Entries of a page."""
    capacity: int
    """Entries of all slots together."""


class DraftCache:
    """Pool, page tables and entry counts; mutated by `reserve`, `release`, and by who computes entries."""

    def __init__(self, layout: DraftLayout, spec: ModelSpec, place: Placement) -> None:
        self._heads = spec.num_layers * spec.num_kv_heads
        self._width = -(-layout.max_length // layout.page_size)
        bundles = min(layout.num_slots * self._width, max(1, layout.capacity // layout.page_size))
        shape = (bundles * self._heads, 2, layout.page_size, spec.head_dim)
        self.layout, self.device = layout, place.device
        self.pool = zeros(shape, place.dtype, place.device)
        """[P, 2, B, D]: keys (0) and values (1)."""
        self.entry_positions = zeros((shape[0], layout.page_size), torch.int32, place.device)
        """[P, B]: logical position of each entry."""
        heads = (spec.num_layers, spec.num_kv_heads)
        self.page_table = torch.zeros((layout.num_slots, *heads, self._width), dtype=torch.int32, device=place.device)
        """[N, L, K, W]; columns past a slot's bundles are stale, but valid ids."""
        self._head_offsets = torch.arange(self._heads, dtype=torch.int32, device=place.device).view(heads)
        self.stored: IntArray = np.zeros(layout.num_slots, np.int32)
        """[N]: entries of every head of the slot whose tokens are known to be the sequence's own."""
        self._bundles: IntArray = np.zeros((layout.num_slots, self._width), np.int32)
        self._held: IntArray = np.zeros(layout.num_slots, np.int32)
        self._free: IntArray = np.arange(bundles, dtype=np.int32)[::-1].copy()
        """A stack: the first `_num_free` are free."""
        self._num_free = bundles
        self._used = np.zeros(layout.num_slots, np.int64)
        """[N]: when the slot last asked for pages, counted in calls."""
        self._calls = 0

    @property
    def num_bytes(self) -> int:
        """Of pages and tables."""
        tensors = (self.pool, self.entry_positions, self.page_table)
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)

    @property
    def num_free(self) -> int:
        """Bundles that no slot holds."""
        return self._num_free

    def reserve(self, slots: IntArray, entries: IntArray) -> np.ndarray:
        """Have pages for `entries` [S] of the distinct slots [S], those named first before others: [S] bool, who has.

        Where pages are short, slots that are not asked for lose theirs, the longest idle first: they may have ended,
        and if not, they compute their entries again.
        """
        self._calls += 1
        self._used[slots] = self._calls
        missing = np.maximum(-(-entries // self.layout.page_size) - self._held[slots], 0)
        total = int(missing.sum())
        if not total:
            return np.ones(len(slots), np.bool_)
        if total > self._num_free:
            self._reclaim(total)
        granted = missing.cumsum() <= self._num_free
        self._grant(slots[granted], missing[granted])
        return granted

    def release(self, slot: int) -> None:
        """The slot's entries are void, its pages free."""
        held = int(self._held[slot])
        self._free[self._num_free : self._num_free + held] = self._bundles[slot, :held]
        self._num_free += held
        self._held[slot] = self.stored[slot] = 0

    def clear(self) -> None:
        """Release every slot."""
        for slot in self._held.nonzero()[0].tolist():
            self.release(slot)

    def tables(self, slots: Tensor, lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Page tables [S, L, K, M] of the slots [S] int64, M pages holding `longest` entries, and `lengths` [S] for
        every head; copies."""
        columns = -(-longest // self.layout.page_size)
        return self.page_table[..., :columns].index_select(0, slots), self.lengths(lengths)

    def lengths(self, lengths: Tensor) -> Tensor:
        """`lengths` [S] for every head: [S, L, K] int32."""
        return lengths.int().view(-1, 1, 1).expand(-1, *self._head_offsets.shape).contiguous()

    def _reclaim(self, total: int) -> None:
        idle = ((self._used < self._calls) & (self._held > 0)).nonzero()[0]
        for slot in idle[self._used[idle].argsort()].tolist():
            if self._num_free >= total:
                return
            self.release(slot)

    def _grant(self, slots: IntArray, counts: IntArray) -> None:
        """The next `counts` [S] bundles of each slot."""
        total = int(counts.sum())
        if not total:
            return
        bundles = self._free[self._num_free - total : self._num_free].copy()
        self._num_free -= total
        owners = slots.repeat(counts)
        columns = np.arange(total) - (counts.cumsum() - counts).repeat(counts) + self._held[owners]
        self._bundles[owners, columns] = bundles
        self._held[slots] += counts
        where = torch.from_numpy(np.stack([owners, columns, bundles]).astype(np.int64)).to(self.device)
        pages = where[2, :, None, None].int() * self._heads + self._head_offsets
        self.page_table[where[0], :, :, where[1]] = pages
        # A former owner's NaN would survive the zero weight that attention gives to what is not filled yet.
        self.pool.index_fill_(0, pages.flatten().long(), 0)
