"""`KVCache`: the tensors of the paged KV cache and of every slot's page table. Which page is whose, others decide."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..core.ids import SlotId
from ..core.plan import BatchPlan, Compaction, IntArray, PageDrop, PageDuplicates, PageGrants, SlotAssignment
from ..kernels.backend import TRITON_BACKENDS, Backend
from ..kernels.cache import entry_destinations, move_entries, row_destinations, zeros
from ..kernels.compaction_cpu import compact_kv_cpu
from ..kernels.compaction_reference import compact_kv
from .sizing import CacheLayout
from .staging import upload


class KVCache:
    """Pool, positions, page tables and kept lengths. Letters as in `models.context`; N slots, R = L * K rows of heads.

    Mutated by `apply` (what changed hands before a step), by the attention layers (the entries), and by `advance`.
    """

    def __init__(self, layout: CacheLayout, num_pages: int, device: torch.device) -> None:
        heads = (layout.num_slots, layout.num_layers, layout.num_kv_heads)
        self.layout = layout
        self.num_pages = num_pages
        self.device = device
        self.pool = zeros((num_pages + 1, 2, layout.page_size, layout.head_dim), layout.dtype, device)
        """[P + 1, 2, B, D]: keys (0) and values (1). The last page is nobody's: padding writes there."""
        self.entry_positions = zeros((num_pages + 1, layout.page_size), torch.int32, device)
        """[P + 1, B]: logical position of each entry."""
        padded = (heads[0] + 1, *heads[1:])
        self.padded_table = zeros((*padded, layout.max_pages), torch.int32, device)
        """[N + 1, L, K, max_pages]: `page_table`, and a slot of padding, all of whose pages are the last one."""
        self.padded_table[-1] = num_pages
        counts: IntArray = np.zeros((padded[0], heads[1] * heads[2]), np.int32)
        self.padded_kept = torch.from_numpy(counts).view(padded).to(device)
        """[N + 1, L, K]: `kept`, and 0 for padding."""
        self.page_table = self.padded_table[:-1]
        """[N, L, K, max_pages]; columns past a head's pages are stale, but valid ids."""
        self.kept = self.padded_kept[:-1]
        """[N, L, K]: entries of each head."""
        self._kept_host: IntArray = counts[:-1]
        """[N, R], equal to `kept`: sizes of a step are known without asking the device. On a CPU the same memory."""
        self._mirrored = device.type != "cpu"
        self._tables_host = None if self._mirrored else self.page_table.view(heads[0], -1, layout.max_pages).numpy()
        """[N, R, max_pages] and [P + 1, ...]: on a CPU `page_table`, and the bytes of `pool`, for NumPy, which takes a
        third of the time that torch does for a few pages."""
        self._pool_host = None if self._mirrored else self.pool.view(torch.uint8).numpy()
        self._columns = np.zeros(heads[0], np.int64)
        """[N]: columns of the slot's table that its sequence may have used."""
        self.computed = np.zeros(heads[0], np.int64)
        """[N]: tokens computed, the position of the slot's next one."""
        self.closes_up = np.zeros(heads[0], np.bool_)
        """[N]: whether the slot's entries are rotated to their places in the cache (`PruneParams.positions`)."""

    @property
    def page_tensors(self) -> tuple[Tensor, ...]:
        """All that a page consists of; the first axis of each is the page."""
        return self.pool, self.entry_positions

    @property
    def num_bytes(self) -> int:
        """Of all pages."""
        return self.num_pages * self.layout.bytes_per_page

    def apply(self, plan: BatchPlan) -> None:
        """Take over the plan's page changes: duplicates, assignments, shares, drops, then grants."""
        if len(plan.duplicates.targets):
            self._duplicate(plan.duplicates)
        if plan.assignments:
            self._begin(plan.assignments)
        if len(plan.shares.pages):
            self._enter(plan.shares)
        for drop in plan.drops:
            self._drop(drop)
        if len(plan.grants.pages):
            # A fresh page is filled entry by entry; attention multiplies what is not yet filled by zero, which a former
            # owner's NaN would survive. Clearing writes what filling the page will write once more.
            fresh = self._enter(plan.grants)
            if self._pool_host is not None:
                self._pool_host[plan.grants.pages] = 0
            else:
                self.pool.index_fill_(0, fresh, 0)

    def _duplicate(self, pages: PageDuplicates) -> None:
        """Copy whole pages."""
        sources, targets = upload(np.stack([pages.sources, pages.targets]), self.device).long()
        for tensor in self.page_tensors:
            tensor.index_copy_(0, targets, tensor.index_select(0, sources))

    def _begin(self, assignments: Sequence[SlotAssignment]) -> None:
        """The slots forget their entries and hold what their new sequences begin with."""
        slots = [assignment.slot for assignment in assignments]
        cached = [assignment.cached for assignment in assignments]
        self._kept_host[slots] = np.asarray(cached, np.int32)[:, None]
        self._columns[slots] = 0
        self.computed[slots] = cached
        indices, counts = upload(np.array([slots, cached], np.int64), self.device)
        self.kept[indices] = counts[:, None, None].to(self.kept.dtype)
        for assignment in assignments:
            prune = assignment.prune
            self.closes_up[assignment.slot] = prune is not None and prune.positions == "cache"
            restored, kept = assignment.restored, assignment.kept
            if restored is not None:
                kept, self.computed[assignment.slot] = restored.kept, restored.computed
            if kept is not None:
                self._kept_host[assignment.slot] = kept
                self.kept[assignment.slot] = upload(kept, self.device).view(self.kept.shape[1:])

    def _drop(self, drop: PageDrop) -> None:
        """Shift the rows' tables left by the dropped pages."""
        kept, entries = self._kept_host[drop.slot], drop.pages * self.layout.page_size
        assert drop.pages > 0 and (kept[drop.rows] >= entries).all(), "a drop takes pages that are not full"
        rows = upload(drop.rows, self.device).long()
        table = self.page_table[drop.slot].view(-1, self.layout.max_pages)
        used = int(self._columns[drop.slot])
        table[rows, : used - drop.pages] = table[rows, drop.pages : used]
        if self._mirrored:
            self.kept[drop.slot].view(-1)[rows] -= entries
        kept[drop.rows] -= entries

    def _enter(self, grants: PageGrants) -> Tensor:
        """Write pages into the tables; returns them, [N] int."""
        assert grants.columns.max() < self.layout.max_pages, "a page is granted past the end of the table"
        assert grants.pages.min() >= 0 and grants.pages.max() < self.num_pages, "a page is granted that is none"
        np.maximum.at(self._columns, grants.slots, grants.columns + 1)
        if self._tables_host is not None:
            self._tables_host[grants.slots, grants.rows, grants.columns] = grants.pages
            return torch.from_numpy(grants.pages)
        stacked = np.stack([grants.slots, grants.rows, grants.columns, grants.pages])
        slots, rows, columns, pages = upload(stacked, self.device).long()
        table = self.page_table.view(len(self._kept_host), -1, self.layout.max_pages)
        table[slots, rows, columns] = pages.int()
        return pages

    def rotary_starts(self, slots: IntArray, starts: IntArray) -> IntArray:
        """Where the next entries of the slots [S] are rotated to, by their logical positions `starts` [S].

        In a slot that closes up all heads keep equally many entries, entry i rotated to position i.
        """
        return np.where(self.closes_up[slots], self._kept_host[slots, 0], starts)

    def counts(self, slot: SlotId) -> IntArray:
        """Entries of each head of the slot, int32 [R]."""
        return self._kept_host[slot].copy()

    def compact(self, compaction: Compaction, layers: Sequence[int], keep: Tensor, backend: Backend) -> None:
        """The slot's heads in `layers` keep the entries `keep` [len(layers), K, E] int32; other layers keep all.

        Only where all layers are compacted may they move to fresh pages.
        """
        slot, heads, size = compaction.slot, self.layout.num_kv_heads, self.layout.page_size
        before, old = self._kept_host[slot].reshape(-1, heads), self.page_table[slot]
        layers = list(layers)
        if compaction.pages is not None:
            assert len(layers) == self.layout.num_layers
            old = old.clone()
            self._hang(slot, -(-compaction.counts // size), compaction.pages)
        move = compact_kv
        if backend in TRITON_BACKENDS:
            from ..kernels.compaction_triton import compact_kv_triton as move  # triton is there beside a GPU only
        elif backend == "cpu":
            move = compact_kv_cpu
        counts = upload(compaction.counts, self.device).view(-1, heads)
        columns = -(-int(before[layers].max()) // size)
        every = list(layers) == list(range(self.layout.num_layers))
        chosen = slice(None) if every else torch.tensor(layers, device=self.device)
        source, target = (table[chosen, :, :columns].flatten(0, 1) for table in (old, self.page_table[slot]))
        kept, in_place = keep.flatten(0, 1), compaction.pages is None
        move(self.pool, self.entry_positions, source, target, kept, counts[chosen].flatten(), in_place=in_place)
        self.kept[slot] = counts
        self._kept_host[slot] = compaction.counts

    def _hang(self, slot: SlotId, held: IntArray, pages: IntArray) -> None:
        """Put fresh pages in the slot's table, `held` [R] per head; what strangers left there is cleared."""
        rows = np.repeat(np.arange(len(held)), held)
        columns = np.arange(len(pages)) - np.repeat(np.cumsum(held) - held, held)
        ids, where = (torch.from_numpy(part).to(self.device) for part in (pages, np.stack([rows, columns])))
        self.pool.index_fill_(0, ids.long(), 0)
        self.page_table[slot].view(len(held), -1)[where[0], where[1]] = ids

    def longest(self, slots: IntArray, lengths: Sequence[int]) -> int:
        """Entries of the longest head once each of the slots [S] has got `lengths` more."""
        return int((self._kept_host[slots].max(axis=1) + np.asarray(lengths)).max())

    def tables(self, slots: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Page tables [S, L, K, M] int32, M pages holding `longest` entries, and kept lengths [S, L, K] of the slots.

        Copies: what a step works with does not change under its hands.
        """
        columns = -(-longest // self.layout.page_size)
        assert columns <= self.layout.max_pages, "a head outgrows its page table"
        return self.page_table[..., :columns].index_select(0, slots), self.kept.index_select(0, slots)

    def keep_rows(self, slots: Iterable[SlotId], rows: Iterable[Sequence[int]]) -> None:
        """Of the entries that the step stored for each of the slots, those of `rows` are to stay: they come to follow
        the slot's own, one after another, for `advance` to count them. rows: ascending, from 0, per slot."""
        moves = [
            (slot, row, place)
            for slot, staying in zip(slots, rows, strict=True)
            for place, row in enumerate(staying)
            if row != place
        ]
        if not moves:
            return
        owners, *orders = upload(np.array(moves, np.int64).T.copy(), self.device)
        size = self.layout.page_size
        sources, targets = (
            row_destinations(self.page_table, self.kept, owners, order, page_size=size).flatten() for order in orders
        )
        move_entries(self.pool, self.entry_positions, sources, targets)

    def advance(self, slots: Tensor, lengths: Tensor, host_slots: IntArray, host_lengths: Sequence[int]) -> None:
        """The step stored `lengths` [S] int32 new entries for every head of the (distinct) `slots` [S] int64."""
        if self._mirrored:
            self.kept.index_add_(0, slots, lengths[:, None, None].expand(-1, *self.kept.shape[1:]))
        self._kept_host[host_slots] += np.asarray(host_lengths, np.int32)[:, None]
        self.computed[host_slots] += np.asarray(host_lengths)

    def wipe(self, slot: SlotId, count: int) -> None:
        """Clear the `count` entries that follow the slot's own: a step stored there what it did not keep."""
        index, size = torch.tensor([slot], device=self.device), self.layout.page_size
        table, kept = self.tables(index, self.longest(np.array([slot]), [count]))
        rows = torch.tensor([0, count], device=self.device)
        places = entry_destinations(table, kept, rows, page_size=size, num_tokens=count).flatten()
        pages = places.div(size, rounding_mode="floor")
        self.pool[pages, :, places % size] = 0

    def clear(self, pages: Tensor) -> None:
        """Empty all slots and the given pages [N] int64: the state before any step that used only these."""
        self.pool.index_fill_(0, pages, 0)
        self.entry_positions.index_fill_(0, pages, 0)
        self.page_table.zero_()
        self.kept.zero_()
        self._kept_host[:] = 0
        self._columns[:] = 0
        self.computed[:] = 0
