"""`DraftCache`: the paged KV cache of a draft model, which lends its pages to slots by itself.

A page holds entries of one head of one layer, as in the target's cache, so the same kernels read it; but nothing is
pruned here, all heads of a slot hold equally many entries, and pages come in bundles of one per head. A bundle is
free, a slot's own, or a block of the prefix index: then nobody writes it, and any number of slots begin with it.
Letters as in `models.context`; N slots, W bundles that a slot may hold.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from ..core.model_spec import ModelSpec
from ..core.plan import IntArray
from ..core.prefix import Bundle, PrefixIndex
from ..kernels.cache import zeros
from ..models.placement import Placement

_RESTING = 64
"""Calls after which a slot that nobody asked for counts as ended: nobody tells when one does."""


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
    """Pool, page tables and entry counts; mutated by `reserve`, `publish`, `release`, and by who computes entries."""

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
        self.held: IntArray = np.zeros(layout.num_slots, np.int32)
        """[N]: bundles of the slot."""
        self.published: IntArray = np.zeros(layout.num_slots, np.int32)
        """[N]: of these, the first ones that are in the index, or whose name another's copy has there."""
        self._bundles: IntArray = np.zeros((layout.num_slots, self._width), np.int32)
        self._free: IntArray = np.zeros(bundles, np.int32)
        """A stack: the first `num_free` are free."""
        self._used = np.zeros(layout.num_slots, np.int64)
        """[N]: when the slot last asked for pages, counted in calls."""
        self._calls = 0
        self.clear()

    @property
    def num_bytes(self) -> int:
        """Of pages and tables."""
        tensors = (self.pool, self.entry_positions, self.page_table)
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)

    def reserve(self, slots: IntArray, entries: IntArray, found: Mapping[int, Sequence[Bundle]]) -> np.ndarray:
        """Have pages for `entries` [S] of the distinct slots [S], those named first before others: [S] bool, who has.

        Those of them that hold nothing begin with the blocks of the index that were `found` for them, if they get the
        rest too. Where pages are short, blocks that nobody uses go first, then slots that are not asked for lose
        theirs, the longest idle first: they may have ended, and if not, they compute their entries again.
        """
        self._calls += 1
        self._used[slots] = self._calls
        resting = (self._used < self._calls - _RESTING) & (self.held > 0)
        for slot in resting.nonzero()[0].tolist() if resting.any() else ():
            self.release(slot)  # its blocks can be found again, and go when it is their turn
        begun = [row for row, slot in enumerate(slots.tolist()) if slot in found] if found else []
        for row in begun:
            self._begin(int(slots[row]), found[int(slots[row])])
        wanted = -(-entries // self.layout.page_size)
        while True:
            missing = np.maximum(wanted - self.held[slots], 0)
            total = int(missing.sum())
            if total > self.num_free:
                self._reclaim(total)
            granted = missing.cumsum() <= self.num_free
            if granted.all() or not begun or granted[begun[-1]]:
                break
            # What this one began with may be what those before it lack.
            self.release(int(slots[begun[-1]]))
            wanted[begun.pop()] = 0
        granted &= wanted > 0
        self._grant(slots[granted], missing[granted], slots[begun])
        return granted

    def publish(self, slot: int, names: Sequence[bytes]) -> None:
        """Let others begin with the slot's first bundles, which are full: `names` are theirs. None that was published
        is written again."""
        blocks = self._blocks[slot]
        for column in range(len(blocks), len(names)):
            blocks.append(self.index.publish(names[column], self._bundles[slot, column : column + 1].copy()))
        self.published[slot] = len(blocks)

    def release(self, slot: int) -> None:
        """The slot's entries are void. Its pages are free, but for those in the index."""
        blocks, own = self._blocks[slot], [*range(self.published[slot], self.held[slot])]
        for column in reversed(range(len(blocks))):
            block = blocks[column]
            if block is None:
                own.append(column)
            else:
                self.index.release(block)
        self._give(self._bundles[slot, own])
        self._blocks[slot] = []
        self.held[slot] = self.stored[slot] = self.published[slot] = 0

    def clear(self) -> None:
        """Forget all slots and blocks."""
        self.index = PrefixIndex(pages_per_bundle=1)
        """Full blocks of known tokens, by name. A page of the index is a bundle here."""
        self._blocks: list[list[Bundle | None]] = [[] for _ in self.held]
        """Of each slot those that it published or began with; None: another's copy was there before."""
        self.num_free = len(self._free)
        self._free[:] = np.arange(self.num_free)[::-1]
        self.held[:] = self.stored[:] = self.published[:] = 0

    def tables(self, slots: Tensor, lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Page tables [S, L, K, M] of the slots [S] int64, M pages holding `longest` entries, and `lengths` [S] for
        every head; copies."""
        columns = -(-longest // self.layout.page_size)
        return self.page_table[..., :columns].index_select(0, slots), self.lengths(lengths)

    def lengths(self, lengths: Tensor) -> Tensor:
        """`lengths` [S] for every head: [S, L, K] int32."""
        return lengths.int().view(-1, 1, 1).expand(-1, *self._head_offsets.shape).contiguous()

    def check(self) -> None:
        """AssertionError unless each bundle is free, one slot's own, or a block of the index, used by those who say so;
        and what is held covers what is stored."""
        users = Counter[int]()
        own = [*self._free[: self.num_free].tolist()]
        for slot, blocks in enumerate(self._blocks):
            bundles = self._bundles[slot, : self.held[slot]].tolist()
            assert len(blocks) == self.published[slot] <= self.held[slot]
            assert self.published[slot] * self.layout.page_size <= self.stored[slot]
            for bundle, block in zip_longest(bundles, blocks):
                if block is None:
                    own.append(bundle)
                else:
                    assert block.pages is not None and block.pages.tolist() == [bundle]
                    users[bundle] += 1
        shared = {int(block.pages[0]): block.users for block in self.index if block.pages is not None}
        self.index.check()
        assert len(shared) == len(self.index) and sorted([*own, *shared]) == list(range(len(self._free)))
        assert {bundle: count for bundle, count in shared.items() if count} == users
        assert (self.held * self.layout.page_size >= self.stored).all()

    def _begin(self, slot: int, blocks: Sequence[Bundle]) -> None:
        count = len(blocks)
        for block in blocks:
            self.index.acquire(block)
        self._blocks[slot] = [*blocks]
        self._bundles[slot, :count] = np.concatenate([block.pages for block in blocks])
        self.held[slot] = self.published[slot] = count
        self.stored[slot] = count * self.layout.page_size

    def _reclaim(self, total: int) -> None:
        """Have `total` free bundles, if there are so many but for what is asked for now."""
        self._give(self.index.reclaim(total - self.num_free))
        idle = ((self._used < self._calls) & (self.held > 0)).nonzero()[0]
        for slot in idle[self._used[idle].argsort()].tolist():
            if self.num_free >= total:
                return
            self.release(slot)
            self._give(self.index.reclaim(total - self.num_free))

    def _give(self, bundles: IntArray) -> None:
        self._free[self.num_free : self.num_free + len(bundles)] = bundles
        self.num_free += len(bundles)

    def _grant(self, slots: IntArray, counts: IntArray, begun: IntArray) -> None:
        """The next `counts` [S] bundles of each slot. The tables of those that have `begun` lack all that they hold."""
        total, shared = int(counts.sum()), int(self.held[begun].sum())
        if not total + shared:
            return
        owners = np.concatenate([begun.repeat(self.held[begun]), slots.repeat(counts)])
        columns = np.concatenate([_ranges(self.held[begun]), _ranges(counts) + self.held[slots].repeat(counts)])
        self.num_free -= total
        self._bundles[owners[shared:], columns[shared:]] = self._free[self.num_free : self.num_free + total]
        self.held[slots] += counts
        bundles = self._bundles[owners, columns]
        where = torch.from_numpy(np.stack([owners, columns, bundles]).astype(np.int64)).to(self.device)
        pages = where[2, :, None, None].int() * self._heads + self._head_offsets
        self.page_table[where[0], :, :, where[1]] = pages
        # A former owner's NaN would survive the zero weight that attention gives to what is not filled yet.
        self.pool.index_fill_(0, pages[shared:].flatten().long(), 0)


def _ranges(counts: IntArray) -> IntArray:
    """0 to n - 1 for each n of the counts [S], one after another."""
    return np.arange(int(counts.sum())) - (counts.cumsum() - counts).repeat(counts)
