"""`CacheManager`: who has which page. Free, in one sequence's table, in several as a prefix, or kept for later.

A sequence's table consists of columns, one page per head each. A column is the sequence's own until it is full and its
tokens are known and computed; then it is published, and belongs to the prefix index from there on:

    blocks    0      1      2     3
            [hit ][hit ][publ.][ own ][ own, being filled
              shared, never written  |  written by this sequence alone

A block that someone else has published meanwhile stays the sequence's own (None in `SequenceState.blocks`). With
sliding windows, pages leave a table one head at a time, so there nothing is published.
"""

import logging
from collections import Counter
from collections.abc import Iterable

import numpy as np

from ..core.plan import IntArray
from .config import SchedulerConfig
from .pages import PagePool
from .prefix import Bundle, PrefixIndex
from .sequence import SequenceState

log = logging.getLogger("quire.scheduler")


class CacheManager:
    """Lends pages to sequences and takes them back; keeps computed prefixes as long as nobody needs the room.

    Always free + used + cached = all pages.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._pool = PagePool(config.num_pages)
        self._index = PrefixIndex(config.num_rows)
        self.queries = 0
        """Prompt tokens looked for in the prefix index, of sequences that started for the first time."""
        self.hits = 0
        """Those found."""
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
        """Pages of prefixes that no sequence uses."""
        return self._index.num_idle_pages

    @property
    def used(self) -> int:
        """Pages in sequences' tables, shared ones counted once."""
        return self._pool.used - self._index.num_idle_pages

    def find(self, sequence: SequenceState) -> list[Bundle]:
        """The leading blocks of a waiting sequence that need not be computed; changes nothing."""
        if not self._config.shares_prefixes:
            return []
        return self._index.match(sequence.hashes, sequence.reusable_blocks(self._config))

    def awaits(self, sequence: SequenceState, hits: list[Bundle], other: SequenceState) -> bool:
        """Whether the block that a waiting sequence needs after its `hits` is about to be computed by `other`.

        Only known tokens count: what `other` will say may be something else.
        """
        size, block = self._config.page_size, len(hits)
        if not self._config.shares_prefixes or block >= sequence.reusable_blocks(self._config) or not other.is_exact:
            return False
        if not other.num_computed < (block + 1) * size <= len(other.tokens):
            return False
        return other.hashes.upto(block + 1)[block] == sequence.hashes.upto(block + 1)[block]

    def cost(self, sequence: SequenceState, hits: list[Bundle]) -> int:
        """How many of the available pages a waiting sequence takes until all its known tokens are computed."""
        in_use = sum(1 for bundle in hits if bundle.users)
        return self._config.pages_needed(sequence.most_entries(self._config)) - in_use * self._config.num_rows

    def owed(self, sequences: Iterable[SequenceState]) -> int:
        """How many more pages these sequences take until all their known tokens are computed."""
        needed = (self._config.pages_needed(len(s.tokens)) - s.table.num_pages for s in sequences)
        return sum(max(pages, 0) for pages in needed)

    def enter(self, sequence: SequenceState, hits: list[Bundle]) -> IntArray:
        """Let a sequence begin with `hits`; returns their pages, int32 [R, len(hits)]."""
        asks = self._config.shares_prefixes and sequence.request.params.prompt_logprobs is None
        if asks and not sequence.preemptions:
            self.queries += sequence.num_prompt
            self.hits += len(hits) * self._config.page_size
            sequence.cached_tokens = len(hits) * self._config.page_size
        if not hits:
            return np.empty((self._config.num_rows, 0), np.int32)
        for bundle in hits:
            self._index.acquire(bundle)
        pages = np.stack([bundle.pages for bundle in hits], axis=1)
        sequence.begin_with(hits, pages, self._config.page_size)
        return pages

    def take(self, count: int) -> IntArray:
        """Lend `count` of the available pages, int32 [count]; reclaims what that needs."""
        if count > self._pool.free:
            self._pool.give(self._index.reclaim(count - self._pool.free))
        return self._pool.take(count)

    def give(self, ids: IntArray) -> None:
        """Take back a sequence's own pages."""
        self._pool.give(ids)

    def publish(self, sequence: SequenceState) -> None:
        """Hand the sequence's newly computed full blocks to the index, for others to begin with."""
        full, blocks = sequence.num_computed // self._config.page_size, sequence.blocks
        if len(blocks) >= full or not self._config.shares_prefixes or not sequence.is_exact:
            return
        digests = sequence.hashes.upto(full)
        for number in range(len(blocks), full):
            blocks.append(self._index.publish(digests[number], sequence.table.column(number)))

    def compact(self, sequence: SequenceState, counts: IntArray) -> tuple[bool, IntArray | None]:
        """Let every head keep `counts` [R] entries. Returns whether that can be, and fresh pages if it takes those.

        What others read, or may read, is left as it is: then the survivors move to fresh pages, if there are as many.
        Else what nobody else uses is no longer offered, and serves the sequence alone.
        """
        shared = [bundle for bundle in sequence.blocks if bundle is not None]
        needed = int((-(-counts // self._config.page_size)).sum())
        if shared and needed <= self.available:
            fresh = self.take(needed)
            self.leave(sequence)
            sequence.table.rebuild(counts, fresh)
            return True, fresh
        if any(bundle.users > 1 for bundle in shared):
            return False, None
        self.withdraw(sequence)
        sequence.blocks.clear()
        self._pool.give(sequence.table.compact(counts))
        return True, None

    def gain(self, sequence: SequenceState, entries: int) -> int:
        """Pages that would surely become available if every head kept at most `entries`; 0 if it could not be done."""
        config, blocks = self._config, sequence.blocks
        after = len(config.full_rows) * -(-entries // config.page_size)
        others = sum(1 for bundle in blocks if bundle is not None and bundle.users > 1) * config.num_rows
        if others and after > self.available:
            return 0
        full = sequence.table.held[config.full_rows].sum()
        return max(int(full) - others - after, 0)

    def withdraw(self, sequence: SequenceState) -> None:
        """Let nobody begin with the sequence's blocks any more: something in them may be wrong."""
        for bundle in sequence.blocks:
            if bundle is not None:
                self._index.withdraw(bundle)

    def leave(self, sequence: SequenceState) -> None:
        """Take back all of a sequence's pages; what it published or began with is kept."""
        blocks = sequence.blocks
        self._pool.give(sequence.table.clear([number for number, bundle in enumerate(blocks) if bundle is not None]))
        for number in reversed(range(len(blocks))):
            bundle = blocks[number]
            if bundle is None:
                # Another's copy leads to the blocks that this sequence published after it.
                self._index.touch(sequence.hashes.upto(number + 1)[number])
            elif not self._index.release(bundle):
                self._pool.give(bundle.pages)
        blocks.clear()

    def reclaim_all(self) -> None:
        """Forget every prefix that no sequence uses."""
        self._pool.give(self._index.reclaim(self._config.num_pages))

    def reclaim_leaked(self) -> int:
        """While no sequence runs: take back the pages that belong to nobody; returns how many. O(1) if there are none.

        A prefix that still counts users is forgotten too: the count is wrong, its pages could never be reclaimed.
        """
        leaked = self.used
        if leaked:
            log.error("%d KV pages belonged to nobody while nothing ran; they are taken back", leaked)
            self.leaks += leaked
            self._index.forget_used()
            self._pool.reset(np.concatenate([np.empty(0, np.int32), *(bundle.pages for bundle in self._index)]))
        return leaked

    def check(self, running: Iterable[SequenceState]) -> None:
        """AssertionError unless pool, index and the tables of the `running` sequences agree; passes over all."""
        self._pool.check()
        self._index.check()
        pages, users = [], Counter[Bundle]()
        for sequence in running:
            for number, bundle in enumerate(sequence.blocks):
                if bundle is not None:
                    users[bundle] += 1
                    assert np.array_equal(sequence.table.column(number), bundle.pages), "a shared column was changed"
            shared = [number for number, bundle in enumerate(sequence.blocks) if bundle is not None]
            pages.append(sequence.table.ids(shared))
        # A withdrawn bundle is no longer indexed, but somebody's still.
        bundles = {*users, *self._index}
        assert all(bundle.users == users[bundle] for bundle in bundles), "a bundle counts other users than it has"
        pages += [bundle.pages for bundle in bundles]
        self._pool.check_owned(np.concatenate(pages) if pages else np.empty(0, np.int32))
