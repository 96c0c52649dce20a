"""`CacheManager`: who has which page. Free, in one sequence's table, in several as a prefix, or kept for later.

A sequence's table consists of columns, one page per head each. A column is the sequence's own until it is full and its
tokens are known and computed; then it is published, and belongs to the prefix index from there on:

    blocks    0      1      2     3
            [hit ][hit ][publ.][ own ][ own, being filled
              shared, never written  |  written by this sequence alone

A block that someone else has published meanwhile stays the sequence's own (None in `SequenceState.blocks`). With
sliding windows, pages leave a table one head at a time, so there nothing is published. What is left of a pruned context
is published as one bundle (`pruned_prefix`); a sequence begins with blocks or with such a one.

Behind the pool there may be a host pool. A prefix whose pages are reclaimed is copied there, and back when a sequence
begins with it. A preempted sequence that is swapped out has its own columns copied there; the shared ones it finds
again by their names, or, if one of them is lost, it is computed anew.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
from msgspec.structs import replace

from ..core.messages import EngineStats
from ..core.plan import IntArray
from ..core.prefix import Bundle, PrefixIndex, StoredBlock
from .config import SchedulerConfig
from .host_tier import HostTier
from .pages import PagePool
from .pins import Pins
from .pruned_prefix import PrunedPrefixes
from .sequence import SequenceState
from .swap_space import SwapSpace

log = logging.getLogger("quire.scheduler")


class CacheManager:
    """Lends pages to sequences and takes them back; keeps computed prefixes as long as nobody needs the room.

    Always free + used + cached = all pages.
    """

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float]) -> None:
        """`clock` gives seconds; pinned prefixes go by it."""
        self._config = config
        self._pool = PagePool(config.num_pages)
        self._index = PrefixIndex(config.num_rows, keeps_idle=config.prefix_cache)
        self.host = HostTier(config.num_host_pages, config.num_rows, self._index.forget_if_gone)
        self.pins = Pins(config, self._index, self.host, clock)
        self.pruned = PrunedPrefixes(config, self._index, self.take)
        self.swaps = SwapSpace(config, self.host)
        self.queries = 0
        """Prompt tokens looked for in the prefix index, of sequences that started for the first time."""
        self.hits = 0
        """Those found."""
        self.host_hits = 0
        """Those of them that were in host memory alone."""
        self.leaks = 0
        """Pages that belonged to nobody, and were taken back."""

    @property
    def available(self) -> int:
        """Pages that can be taken now: free ones and those of prefixes that no sequence uses."""
        return self._pool.free + self._index.num_idle_pages

    @property
    def watermark(self) -> int:
        """Pages that admission leaves for those that run."""
        return self._config.watermark

    @property
    def cached(self) -> int:
        """Pages of prefixes that no sequence uses, pinned ones included."""
        return self._index.num_idle_pages + self._index.num_held_pages

    @property
    def used(self) -> int:
        """Pages in sequences' tables, shared ones counted once."""
        return self._pool.used - self.cached

    def find(self, sequence: SequenceState) -> list[Bundle]:
        """What of a waiting sequence need not be computed: leading blocks, or a pruned prefix, or what it shared.

        A swapped-out sequence that lost a shared block is one to be computed again from here on.
        """
        if sequence.swapped is not None:
            found = [self._index.get(digest) for digest in sequence.swapped.shared.values()]
            known = [bundle for bundle in found if bundle is not None]
            if len(known) == len(found):
                return known
            self.swaps.discard(sequence)
        if not sequence.shares:
            return []
        pruned = self.pruned.find(sequence)
        if pruned is not None:
            return [pruned]
        return self._index.match(sequence.hashes, sequence.reusable_blocks(self._config))

    def awaits(self, sequence: SequenceState, hits: list[Bundle], other: SequenceState) -> bool:
        """Whether what a waiting sequence needs after its `hits` is about to be computed by `other`.

        Only known tokens count: what `other` will say may be something else.
        """
        if _pruned(hits) is not None:
            return False
        if self.pruned.awaits(sequence, other):
            return True
        size, block = self._config.page_size, len(hits)
        if not (sequence.shares and other.shares and other.is_exact) or sequence.swapped is not None:
            return False
        if block >= sequence.reusable_blocks(self._config):
            return False
        if not other.num_computed < (block + 1) * size <= len(other.tokens):
            return False
        return other.hashes.upto(block + 1)[block] == sequence.hashes.upto(block + 1)[block]

    def cost(self, sequence: SequenceState, hits: list[Bundle]) -> int:
        """How many of the available pages a waiting sequence takes until all its known tokens are computed."""
        pruned = _pruned(hits)
        if pruned is not None:
            return self.pruned.cost(sequence, pruned)
        config, entries = self._config, sequence.most_entries(self._config)
        # One that prunes may begin with more than it will ever hold of its own.
        most = max(sequence.most_pages(config), len(hits) * config.num_rows)
        in_use = sum(1 for bundle in hits if bundle.pages is not None and (bundle.users or bundle.pinned))
        if sequence.swapped is not None:
            most = sequence.swapped.most_pages(max(entries, len(sequence.tokens)), config.page_size, most)
        return most - in_use * config.num_rows

    def owed(self, sequences: Iterable[SequenceState]) -> int:
        """How many more pages these sequences take until all their known tokens are computed."""
        needed = (sequence.most_pages(self._config) - sequence.table.num_pages for sequence in sequences)
        return sum(max(pages, 0) for pages in needed)

    def enter(self, sequence: SequenceState, hits: list[Bundle]) -> None:
        """Let a sequence begin with `hits`, and with what of it was swapped out."""
        absent = [bundle for bundle in hits if bundle.pages is None]
        self._count(sequence, hits)
        self.host.reserve(absent)
        for bundle in hits:
            self._index.acquire(bundle)
        for bundle in absent:
            bundle.pages = self.take(bundle.size)
            self.host.recall(bundle)
        pruned = _pruned(hits)
        if sequence.swapped is not None:
            pages = self.take(len(sequence.swapped.host))
            self.swaps.bring_back(sequence, hits, pages)
        elif pruned is not None:
            self.pruned.begin(sequence, pruned)
        elif hits:
            shared = np.stack([bundle.pages for bundle in hits if bundle.pages is not None], axis=1)
            sequence.begin_with(hits, shared, self._config.page_size)

    def _count(self, sequence: SequenceState, hits: list[Bundle]) -> None:
        """Of a sequence's first start: what it looked for, and what was there."""
        if not sequence.shares or sequence.preemptions or sequence.request.params.prompt_logprobs is not None:
            return
        whole = sequence.prune is not None and _pruned(hits) is not None
        tokens = sequence.prune.prefill_end if sequence.prune is not None and whole else self._config.page_size
        sequence.cached_tokens = len(hits) * tokens
        if self._config.prefix_cache:
            self.queries += sequence.num_prompt
            self.hits += sequence.cached_tokens
            self.host_hits += sum(bundle.pages is None for bundle in hits) * tokens
            self.pruned.hits += sequence.cached_tokens if whole else 0

    def take(self, count: int) -> IntArray:
        """Lend `count` of the available pages, int32 [count]; reclaims what that needs."""
        if count > self._pool.free:
            spill = self.host.spill if self.host.total else None
            self._pool.give(self._index.reclaim(count - self._pool.free, spill))
        return self._pool.take(count)

    def give(self, ids: IntArray) -> None:
        """Take back a sequence's own pages."""
        self._pool.give(ids)

    def publish(self, sequence: SequenceState) -> None:
        """Hand the sequence's newly computed full blocks to the index, for others to begin with."""
        full, blocks = sequence.num_computed // self._config.page_size, sequence.blocks
        if len(blocks) >= full or not (sequence.shares and sequence.is_exact):
            return
        digests = sequence.hashes.upto(full)
        for number in range(len(blocks), full):
            blocks.append(self._index.publish(digests[number], sequence.table.column(number)))

    def compact(self, sequence: SequenceState, counts: IntArray) -> tuple[bool, IntArray | None]:
        """Let every head keep `counts` [R] entries. Returns whether that can be, and fresh pages if it takes those.

        What others read, or may read, is left as it is, and what is pinned: then the survivors move to fresh pages, if
        there are as many. Else what nobody else uses is no longer offered, and serves the sequence alone.
        """
        shared = _shared(sequence)
        needed = int((-(-counts // self._config.page_size)).sum())
        if shared and needed <= self.available:
            fresh = self.take(needed)
            self.leave(sequence)
            sequence.table.rebuild(counts, fresh)
            return True, fresh
        if any(bundle.users > 1 or bundle.pinned for bundle in shared):
            return False, None
        self.withdraw(sequence)
        sequence.blocks.clear()
        if sequence.base is not None:
            self._pool.give(self.pruned.own(sequence))
        self._pool.give(sequence.table.compact(counts))
        return True, None

    def publish_pruned(self, sequence: SequenceState) -> None:
        """The sequence was compacted: if that was its context's prune, others may begin with what is left."""
        self.pruned.publish(sequence, self.available - self._config.watermark)

    def gain(self, sequence: SequenceState, entries: int) -> int:
        """Pages that would surely become available if every head kept at most `entries`; 0 if it could not be done."""
        config, blocks = self._config, sequence.blocks
        after = len(config.full_rows) * -(-entries // config.page_size)
        stay = sum(1 for bundle in blocks if bundle is not None and (bundle.users > 1 or bundle.pinned))
        others = stay * config.num_rows
        if sequence.base is not None and (sequence.base.users > 1 or sequence.base.pinned):
            others = int(sequence.table.borrowed.sum())
        if others and after > self.available:
            return 0
        full = sequence.table.held[config.full_rows].sum()
        return max(int(full) - others - after, 0)

    def withdraw(self, sequence: SequenceState) -> None:
        """Let nobody begin with what the sequence shares any more: something in it may be wrong."""
        for bundle in _shared(sequence):
            self._forget(bundle)

    def _forget(self, bundle: Bundle) -> None:
        self._index.withdraw(bundle)
        self.pins.forget(bundle)
        self.host.forget(bundle)

    def make_room(self, sequence: SequenceState, needed: int) -> bool:
        """Have `needed` pages available for a sequence that is alone, whatever is kept for others; False if too few."""
        while needed > self.available and self.pins.drop():
            pass
        base = sequence.base
        if needed > self.available and base is not None and base.users == 1:
            self._forget(base)
            self._pool.give(self.pruned.own(sequence))
        return needed <= self.available

    def leave(self, sequence: SequenceState) -> None:
        """Take back all of a sequence's pages; what it published or began with is kept."""
        blocks = sequence.blocks
        self.pins.prolong(sequence)
        self.pruned.forget(sequence)
        self._pool.give(sequence.table.clear([number for number, bundle in enumerate(blocks) if bundle is not None]))
        for number in reversed(range(len(blocks))):
            bundle = blocks[number]
            if bundle is None:
                # Another's copy leads to the blocks that this sequence published after it.
                self._index.touch(sequence.hashes.upto(number + 1)[number])
            elif not self._index.release(bundle):
                assert bundle.pages is not None
                self._pool.give(bundle.pages)
        blocks.clear()
        base, sequence.base = sequence.base, None
        if base is not None and not self._index.release(base):
            assert base.pages is not None
            self._pool.give(base.pages)

    # --- prefixes of another run ---

    def stored(self) -> list[StoredBlock]:
        """Prefix blocks that no sequence uses, wherever they are: the next to be given up first; no pruned ones."""
        blocks = []
        for bundle in (*(bundle for bundle in self.host.stored() if bundle.pages is None), *self._index.idle()):
            if bundle.kept is not None:
                continue
            pages = bundle.host if bundle.pages is None else bundle.pages
            assert pages is not None
            blocks.append(StoredBlock(bundle.digest, pages, in_host=bundle.pages is None))
        return blocks

    def adopt(self, digests: list[bytes]) -> list[StoredBlock]:
        """Make room for blocks of an earlier run, given as `stored` orders them, before the first request.

        Free pages only, on the device first. Returns those that fit, the last ones; the caller fills them.
        """
        bundles: list[Bundle] = []
        for digest in reversed(digests if self._config.prefix_cache else []):
            bundle = Bundle(digest, None, users=0)
            if self._pool.free >= self._config.num_rows:
                bundle.pages = self._pool.take(self._config.num_rows)
            elif (host := self.host.adopt()) is not None:
                bundle.host = host
            else:
                break
            bundles.append(bundle)
        bundles.reverse()
        for bundle in bundles:
            self._index.adopt(bundle)
            self.host.touch(bundle)
        return self.stored()

    def reclaim_all(self) -> None:
        """Forget every prefix that no sequence uses, pinned or not, on either side."""
        self.pins.clear()
        self._pool.give(self._index.reclaim(self._config.num_pages))
        self.host.drop_copies()

    def report(self, stats: EngineStats) -> EngineStats:
        """The counts with those of pages, prefixes and swaps."""
        self.pins.expire()
        host, page_bytes = self.host, self._config.page_bytes
        return replace(
            stats,
            pages_used=self.used,
            pages_cached=self.cached,
            pages_total=self._config.num_pages,
            prefix_queries_total=self.queries,
            prefix_hits_total=self.hits,
            prefix_host_hits_total=self.host_hits,
            page_leaks_total=self.leaks,
            prefix_pruned_hits_total=self.pruned.hits,
            pages_pinned=self.pins.num_pages,
            pins_dropped_total=self.pins.dropped,
            host_pages_parked=host.parked,
            host_pages_cached=host.cached,
            host_pages_total=host.total,
            swap_out_sequences_total=self.swaps.swapped_out,
            swap_in_sequences_total=self.swaps.swapped_in,
            swap_out_pages_total=host.pages_out,
            swap_in_pages_total=host.pages_in,
            swap_out_bytes_total=host.pages_out * page_bytes,
            swap_in_bytes_total=host.pages_in * page_bytes,
        )

    def reclaim_leaked(self) -> int:
        """While no sequence runs: take back the pages that belong to nobody; returns how many. O(1) if there are none.

        A prefix that still counts users is forgotten too: the count is wrong, its pages could never be reclaimed.
        """
        leaked = self.used
        if leaked:
            log.error("%d KV pages belonged to nobody while nothing ran; they are taken back", leaked)
            self.leaks += leaked
            for bundle in self._index.used():
                self._forget(bundle)
            kept = [bundle.pages for bundle in self._index if bundle.pages is not None]
            self._pool.reset(np.concatenate([np.empty(0, np.int32), *kept]))
        return leaked

    def check(self, running: Iterable[SequenceState], waiting: Iterable[SequenceState] = ()) -> None:
        """AssertionError unless pools, index and the tables of all sequences agree; passes over all."""
        self._pool.check()
        self.host.check([sequence.swapped.host for sequence in waiting if sequence.swapped], self._index)
        self.pins.check()
        self._index.check()
        pages, users = [], Counter[Bundle]()
        for sequence in running:
            for number, bundle in enumerate(sequence.blocks):
                if bundle is not None:
                    users[bundle] += 1
                    assert bundle.pages is not None
                    assert np.array_equal(sequence.table.column(number), bundle.pages), "a shared column was changed"
            shared = [number for number, bundle in enumerate(sequence.blocks) if bundle is not None]
            if sequence.base is not None:
                users[sequence.base] += 1
                self.pruned.check(sequence)
            pages.append(sequence.table.own(shared))
        # A withdrawn bundle is no longer indexed, but somebody's still.
        bundles = {*users, *(bundle for bundle in self._index if bundle.pages is not None)}
        assert all(bundle.users == users[bundle] for bundle in bundles), "a bundle counts other users than it has"
        pages += [bundle.pages for bundle in bundles if bundle.pages is not None]
        self._pool.check_owned(np.concatenate(pages) if pages else np.empty(0, np.int32))


def _pruned(hits: list[Bundle]) -> Bundle | None:
    """The pruned prefix that these are, if they are one."""
    return hits[0] if hits and hits[0].kept is not None else None


def _shared(sequence: SequenceState) -> list[Bundle]:
    """What others may read of the sequence's pages."""
    blocks = [bundle for bundle in sequence.blocks if bundle is not None]
    return blocks if sequence.base is None else [*blocks, sequence.base]
