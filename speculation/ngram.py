"""`NgramDrafter`: proposes what followed the last time that the newest tokens occurred in the same sequence.

Prompt lookup (Saxena 2023) with the longest match of suffix decoding (Oliaro et al. 2024), found by the hash chains of
LZ77 compressors instead of a suffix tree: for two gram lengths, a table of the newest position of each gram and, per
position, the next older one with the same hash. New tokens are added as they come, nothing is scanned twice, and a
look-up compares at most a few candidates, whatever the length of the history.
"""

from collections.abc import Sequence

import numpy as np

from ..core.plan import NO_TOKEN, IntArray
from ..core.speculation import DraftMethod
from .drafter import Draw, Proposals
from .history import TokenHistory

ORDERS = (6, 2)
"""Grams that are indexed, longest first; the last is the shortest match that can be found."""
_CANDIDATES = 8
"""Of one gram, newest first, that a look-up compares."""
_ENOUGH = 32
"""Tokens of a match beyond which none is better."""
_BUCKETS = 1 << 15
_MULTIPLIER = 0x9E3779B97F4A7C15
_SHIFT = 64 - 15
_MASK = (1 << 64) - 1
_FEW = 48
"""New tokens that are added one by one; more are worth the dozen calls of adding them together."""


class NgramDrafter:
    """Fulfils `Drafter`; draws from no distribution. N slots of up to `max_length` tokens."""

    method: DraftMethod = "ngram"

    def __init__(self, num_slots: int, max_length: int, shortest: int = ORDERS[-1]) -> None:
        """shortest: tokens of a match that counts, at least those of the shortest gram."""
        self._max_length, self._shortest = max_length, shortest
        self._indices: list[GramIndex | None] = [None] * num_slots

    @property
    def num_bytes(self) -> int:
        """Of the indices of slots that have drafted."""
        return sum(index.num_bytes for index in self._indices if index is not None)

    def assign(self, slot: int) -> None:
        """See `Drafter`."""
        index = self._indices[slot]
        if index is not None:
            index.clear()

    def clear(self) -> None:
        """See `Drafter`."""
        self._indices = [None] * len(self._indices)

    def propose(self, history: TokenHistory, slots: IntArray, most: IntArray, draw: Draw) -> Proposals:
        """See `Drafter`. A proposal is at most as long as the match it rests on."""
        tokens: IntArray = np.full((len(slots), int(most.max(initial=1))), NO_TOKEN, np.int32)
        counts: IntArray = np.zeros(len(slots), np.int32)
        for row, (slot, limit) in enumerate(zip(slots.tolist(), most.tolist(), strict=True)):
            index = self._indices[slot]
            if index is None:
                index = self._indices[slot] = GramIndex(self._max_length, self._shortest)
            found = index.continuation(history.of(slot), limit)
            tokens[row, : len(found)] = found
            counts[row] = len(found)
        return Proposals(tokens, counts)


class GramIndex:
    """Where the grams of one growing token sequence occurred."""

    def __init__(self, max_length: int, shortest: int = ORDERS[-1]) -> None:
        """shortest: as in `NgramDrafter`."""
        self._shortest = shortest
        self._newest = np.full((len(ORDERS), _BUCKETS), -1, np.int32)
        self._older = np.empty((len(ORDERS), max_length), np.int32)
        # Single elements through memoryviews: several times faster than through the arrays.
        self._chains = [
            (order, newest.data, older.data)
            for order, newest, older in zip(ORDERS, self._newest, self._older, strict=True)
        ]
        self._size = 0

    @property
    def num_bytes(self) -> int:
        """Of both tables."""
        return self._newest.nbytes + self._older.nbytes

    def clear(self) -> None:
        """Another sequence begins."""
        self._newest.fill(-1)
        self._size = 0

    def continuation(self, tokens: IntArray, most: int) -> Sequence[int]:
        """Up to `most` tokens that may follow `tokens` [n] int32, which begin with all tokens of earlier calls."""
        self._extend(tokens)
        view, end = tokens.data, len(tokens)
        start, length = self._longest_match(view)
        # A match that reaches into its own continuation repeats with the distance as its period.
        distance = end - start
        return [view[start + i % distance] for i in range(min(most, length))]

    def _longest_match(self, view: memoryview) -> tuple[int, int]:
        """Where the longest, among equals the newest, match of the last tokens ends, and its length; 0: none."""
        last = len(view) - 1
        best, start = 0, 0
        for order, _, older in self._chains:
            if last + 1 < order:
                continue
            candidate = older[last]
            for _ in range(_CANDIDATES):
                if candidate < 0:
                    break
                # Only a match that is longer at its far end needs comparing.
                if candidate >= best and view[candidate - best] == view[last - best]:
                    length = _common(view, candidate, last)
                    if length > best:
                        best, start = length, candidate + 1
                candidate = older[candidate]
            if best >= order:
                break
        return (start, best) if best >= self._shortest else (0, 0)

    def _extend(self, tokens: IntArray) -> None:
        first, self._size = self._size, len(tokens)
        if len(tokens) - first > _FEW:
            self._add_many(tokens, first)
            return
        view = tokens.data
        for end in range(first, len(tokens)):
            for order, newest, older in self._chains:
                if end + 1 < order:
                    continue
                key = 0
                for token in view[end + 1 - order : end + 1]:
                    key = (key + token + 1) * _MULTIPLIER & _MASK
                key >>= _SHIFT
                older[end] = newest[key]
                newest[key] = end

    def _add_many(self, tokens: IntArray, first: int) -> None:
        """The same for all tokens from `first` on at once."""
        for row, order in enumerate(ORDERS):
            begin = max(first, order - 1)
            ends = np.arange(begin, len(tokens))
            keys = np.zeros(len(ends), np.uint64)
            for offset in range(order - 1, -1, -1):
                keys += tokens[begin - offset : len(tokens) - offset].astype(np.uint64) + np.uint64(1)
                keys *= np.uint64(_MULTIPLIER)
            keys >>= np.uint64(_SHIFT)
            by_key = keys.argsort(kind="stable")
            ordered = keys[by_key]
            fresh = np.ones(len(ordered), np.bool_)
            np.not_equal(ordered[1:], ordered[:-1], out=fresh[1:])
            before = np.empty(len(ordered), np.int32)
            before[1:] = ends[by_key[:-1]]
            before[fresh] = self._newest[row, ordered[fresh]]
            self._older[row, ends[by_key]] = before
            latest = np.append(fresh[1:], True)
            self._newest[row, ordered[latest]] = ends[by_key[latest]]


def _common(view: memoryview, first: int, second: int) -> int:
    """Tokens, at most `_ENOUGH`, that are equal going back from two positions, the first being the smaller."""
    length, limit = 0, min(_ENOUGH, first + 1)
    while length < limit and view[first - length] == view[second - length]:
        length += 1
    return length
