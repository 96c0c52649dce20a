"""`DraftPrefixes`: what a draft model's cache has of sequences that it has not seen, by the names of their blocks."""

import numpy as np
import numpy.typing as npt

from ..core.plan import IntArray
from ..core.prefix import BlockHashes, Bundle
from .draft_cache import DraftCache
from .history import TokenHistory


class DraftPrefixes:
    """Finds blocks for slots and publishes theirs. B tokens of a block."""

    def __init__(self, cache: DraftCache) -> None:
        self._cache = cache
        self._size = cache.layout.page_size
        self._names: dict[int, BlockHashes] = {}
        """By slot, of the sequence that it has now."""

    def forget(self, slot: int) -> None:
        """Another sequence has entered the slot."""
        self._names.pop(slot, None)

    def clear(self) -> None:
        """Forget all slots."""
        self._names.clear()

    def find(self, history: TokenHistory, slots: IntArray) -> dict[int, list[Bundle]]:
        """By slot, of those that hold nothing, the longest run of known blocks short of the newest token; none: it is
        left out."""
        found: dict[int, list[Bundle]] = {}
        holds = self._cache.held[slots]
        if holds.all() or not len(self._cache.index):
            return found
        for slot in slots[holds == 0].tolist():
            blocks = self._cache.index.match(self._of(history, slot), (int(history.known[slot]) - 1) // self._size)
            if blocks:
                found[slot] = blocks
        return found

    def tokens(self, found: dict[int, list[Bundle]], slots: IntArray) -> IntArray:
        """[S]: how many are in the blocks found for each of the slots [S]."""
        if not found:
            return np.zeros(len(slots), np.int32)
        return np.array([len(found.get(slot, ())) for slot in slots.tolist()], np.int32) * self._size

    def ready(self, history: TokenHistory, slots: IntArray, missing: IntArray, most: int) -> npt.NDArray[np.bool_]:
        """[S]: all but those of the slots [S] that hold nothing and had better wait, for most of what they lack is
        computed now for one before them; missing [S]: tokens that each lacks, most: tokens that a step computes."""
        ready = np.ones(len(slots), np.bool_)
        claimed: set[bytes] = set()
        for row in np.flatnonzero(missing > self._size).tolist():
            slot, tokens = int(slots[row]), min(int(missing[row]), most)
            first = int(history.known[slot] - missing[row]) // self._size
            end = first + (tokens - 1) // self._size
            names = self._of(history, slot).upto(end)[first:end]
            shared = next((count for count, name in enumerate(names) if name not in claimed), len(names))
            ready[row] = self._cache.held[slot] or 2 * shared * self._size < tokens
            if ready[row]:
                claimed.update(names)
        return ready

    def publish(self, history: TokenHistory, slots: IntArray, entries: IntArray) -> None:
        """Publish the full blocks among the first `entries` [S] of the slots [S]; all of these are of known tokens."""
        full = entries // self._size
        more = full > self._cache.published[slots]
        if not more.any():
            return
        for slot, count in zip(slots[more].tolist(), full[more].tolist(), strict=True):
            self._cache.publish(slot, self._of(history, slot).upto(count)[:count])

    def _of(self, history: TokenHistory, slot: int) -> BlockHashes:
        names = self._names.get(slot)
        if names is None:
            names = BlockHashes(history.namespaces[slot], history.tokens[slot], self._size)
            self._names[slot] = names
        return names
