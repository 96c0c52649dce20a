"""`NgramDrafter`: proposes what followed the last time that the newest tokens occurred in the same sequence.

Prompt lookup (Saxena 2023) with the longest match of suffix decoding (Oliaro et al. 2024), found by the hash chains of
LZ77 compressors instead of a suffix tree: for two gram lengths, a table of the newest position of each gram and, per
position, the next older one with the same hash. New tokens are added as they come, nothing is scanned twice, and a
look-up compares at most a few candidates, whatever the length of the history.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..core.plan import NO_TOKEN, IntArray
from ..core.speculation import MAX_DRAFT_TOKENS, DraftMethod
from ..kernels.cpu_library import CpuLibrary, GramsArgs
from .drafter import Draw, Proposals
from .history import TokenHistory

Places = npt.NDArray[np.int64]

SHORTEST, _LONG = 2, 6
"""Tokens of the grams that are indexed: those of the shortest match that counts, if nobody says otherwise, and more."""
_CANDIDATES = 8
"""Of one gram, newest first, that a look-up compares."""
_ENOUGH = 32
"""Tokens of a match beyond which none is better."""
_BUCKETS = 1 << 15
_MULTIPLIER = 0x9E3779B97F4A7C15
_SHIFT = 64 - 15
_MASK = (1 << 64) - 1
_FEW = 24
"""New tokens that are added one by one; more are worth the dozen calls of adding them together."""
_FEW_SLOTS = 24
"""The same for slots to be looked up."""


class NgramDrafter:
    """Fulfils `Drafter` and `Foresight`; draws from no distribution. N slots of up to `max_length` tokens."""

    method: DraftMethod = "ngram"

    def __init__(
        self, num_slots: int, max_length: int, shortest: int = SHORTEST, library: CpuLibrary | None = None
    ) -> None:
        """shortest: tokens of a match that counts; library: see `GramIndex`."""
        self._index = GramIndex(num_slots, max_length, shortest, library)

    @property
    def num_bytes(self) -> int:
        """Of the indices of slots that have drafted."""
        return self._index.num_bytes

    def assign(self, slot: int) -> None:
        """See `Drafter`."""
        self._index.enter(slot)

    def clear(self) -> None:
        """See `Drafter`."""
        self._index.clear()

    def foresee(self, history: TokenHistory, slots: IntArray) -> IntArray:
        """See `Foresight`."""
        return self._index.match(history, slots)

    def propose(self, history: TokenHistory, slots: IntArray, most: IntArray, draw: Draw) -> Proposals:
        """See `Drafter`. A proposal is at most as long as the match it rests on."""
        return Proposals(*self._index.continuations(history, slots, most))


class GramIndex:
    """Where the grams of N growing token sequences occurred. Memory is taken from the system as it is written."""

    def __init__(
        self, num_slots: int, max_length: int, shortest: int = SHORTEST, library: CpuLibrary | None = None
    ) -> None:
        """shortest: as in `NgramDrafter`; library: works by it instead of by Python, which takes longer than a tiny
        model's layer."""
        assert shortest < _LONG
        self._library = library
        self._orders, self._num_slots, self._max_length = (_LONG, shortest), num_slots, max_length
        # A hash whose sum of products is the same as token after token multiplied in.
        self._powers = np.array([pow(_MULTIPLIER, _LONG - i, 1 << 64) for i in range(_LONG)], np.uint64)
        self._reach, self._back = np.arange(1 - _LONG, 1), np.arange(MAX_DRAFT_TOKENS + 1)
        firsts = np.arange(len(self._orders))[:, None] * num_slots
        self._heads, self._tails = firsts * _BUCKETS, firsts * max_length
        self.clear()

    def clear(self) -> None:
        """Forget all slots."""
        num_slots, max_length, orders = self._num_slots, self._max_length, len(self._orders)
        self._newest = np.zeros((orders, num_slots, _BUCKETS), np.int32)
        """Position of a gram's last token, counted from 1; 0: none."""
        self._older = np.zeros((orders, num_slots, max_length), np.int32)
        self._size: IntArray = np.zeros(num_slots, np.int32)
        """[N]: tokens that are indexed."""
        self._used = np.zeros(num_slots, np.bool_)
        # Single elements through memoryviews: several times faster than through the arrays.
        self._chains = [
            [(order, self._newest[i, slot].data, self._older[i, slot].data) for i, order in enumerate(self._orders)]
            for slot in range(num_slots)
        ]

        self._told_of: TokenHistory | None = None
        """The history that the arguments are of."""
        self._args = GramsArgs(
            newest=self._newest.ctypes.data, older=self._older.ctypes.data, size=self._size.ctypes.data,
            slots=num_slots, length=max_length, buckets=_BUCKETS, shift=_SHIFT, candidates=_CANDIDATES, enough=_ENOUGH,
            most=MAX_DRAFT_TOKENS, orders=self._orders,
        )  # fmt: skip

    @property
    def num_bytes(self) -> int:
        """Of both tables, of slots that were ever asked for."""
        whole = self._newest.nbytes + self._older.nbytes
        return whole // len(self._used) * int(np.count_nonzero(self._used))

    def enter(self, slot: int) -> None:
        """Another sequence begins in the slot."""
        if self._size[slot]:
            self._newest[:, slot] = 0
            self._size[slot] = 0

    def match(self, history: TokenHistory, slots: IntArray) -> IntArray:
        """Take in what is new of the distinct slots [S]; then `matched`, `MAX_DRAFT_TOKENS` at most."""
        if self._library is None:
            self.extend(history, slots)
            return np.minimum(self.matched(history, slots), MAX_DRAFT_TOKENS)
        slots, matched = np.ascontiguousarray(slots, np.int32), np.empty(len(slots), np.int32)
        self._library.match_grams(self._args_of(history, slots), slots.ctypes.data, len(slots), matched.ctypes.data)
        return matched

    def continuations(self, history: TokenHistory, slots: IntArray, most: IntArray) -> tuple[IntArray, IntArray]:
        """Take in what is new of the distinct slots [S]; then [S, k] `continuation` of each, padded with `NO_TOKEN`, of
        up to `most` [S] tokens, k in all; and [S] how many these are."""
        tokens: IntArray = np.full((len(slots), int(most.max(initial=1))), NO_TOKEN, np.int32)
        counts: IntArray = np.zeros(len(slots), np.int32)
        if self._library is not None:
            slots, most = (np.ascontiguousarray(column, np.int32) for column in (slots, most))
            arrays = slots.ctypes.data, most.ctypes.data, len(slots), tokens.ctypes.data, tokens.shape[1]
            self._library.continue_grams(self._args_of(history, slots), *arrays, counts.ctypes.data)
            return tokens, counts
        self.extend(history, slots)
        for row, (slot, limit) in enumerate(zip(slots.tolist(), most.tolist(), strict=True)):
            found = self.continuation(history, slot, limit)
            tokens[row, : len(found)] = found
            counts[row] = len(found)
        return tokens, counts

    def _args_of(self, history: TokenHistory, slots: IntArray) -> GramsArgs:
        """What the library is told of the tokens of slots that it looks at."""
        self._used[slots] = True
        if self._told_of is not history:
            assert history.tokens.shape[1] == self._max_length
            self._args.tokens, self._args.known = history.tokens.ctypes.data, history.known.ctypes.data
            self._told_of = history
        return self._args

    def extend(self, history: TokenHistory, slots: IntArray) -> None:
        """Take in what is new of the distinct slots [S]."""
        first, known = self._size[slots], history.known[slots]
        starts, ends = first.tolist(), known.tolist()
        total = sum(ends) - sum(starts)
        self._size[slots] = known
        self._used[slots] = True
        if total <= _FEW:
            for slot, start, end in zip(slots.tolist(), starts, ends, strict=True):
                self._add_few(slot, history.tokens[slot].data, start, end)
        else:
            counts = known - first
            begins = (np.cumsum(counts) - counts - first).repeat(counts)
            self._add_many(history.tokens, slots.repeat(counts).astype(np.int64), np.arange(total) - begins)

    def matched(self, history: TokenHistory, slots: IntArray) -> IntArray:
        """[S]: how many of the newest tokens stood together before, up to `MAX_DRAFT_TOKENS` at least; 0: too few.

        Of many slots only the newest occurrence of each gram is looked at: then it may be more.
        """
        if len(slots) <= _FEW_SLOTS:
            return np.array([self._longest_match(slot, history.of(slot).data)[1] for slot in slots.tolist()], np.int32)
        last = history.known[slots] - 1
        places = np.concatenate([last[None], self._older[:, slots, last] - 1])[:, :, None] - self._back
        tokens = history.tokens[slots[:, None], places]
        alike = (tokens[1:] == tokens[0]) & (places[1:] >= 0)
        alike[:, :, -1] = False
        best = alike.argmin(axis=2).max(axis=0)
        return np.where(best >= self._orders[-1], best, 0).astype(np.int32)

    def continuation(self, history: TokenHistory, slot: int, most: int) -> Sequence[int]:
        """Up to `most` tokens that may follow those of the slot, which have been taken in."""
        view = history.of(slot).data
        start, length = self._longest_match(slot, view)
        # A match that reaches into its own continuation repeats with the distance as its period.
        distance = len(view) - start
        return [view[start + i % distance] for i in range(min(most, length))]

    def _longest_match(self, slot: int, view: memoryview) -> tuple[int, int]:
        """Where the longest, among equals the newest, match of the last tokens ends, and its length; 0: none."""
        last = len(view) - 1
        best, start = 0, 0
        for order, _, older in self._chains[slot]:
            if last + 1 < order:
                continue
            candidate = older[last] - 1
            for _ in range(_CANDIDATES):
                if candidate < 0:
                    break
                # Only a match that is longer at its far end needs comparing.
                if candidate >= best and view[candidate - best] == view[last - best]:
                    length = _common(view, candidate, last)
                    if length > best:
                        best, start = length, candidate + 1
                candidate = older[candidate] - 1
            if best >= order:
                break
        return (start, best) if best >= self._orders[-1] else (0, 0)

    def _add_few(self, slot: int, view: memoryview, first: int, known: int) -> None:
        for end in range(first, known):
            for order, newest, older in self._chains[slot]:
                if end + 1 < order:
                    continue
                key = 0
                for token in view[end + 1 - order : end + 1]:
                    key = (key + token + 1) * _MULTIPLIER & _MASK
                key >>= _SHIFT
                older[end] = newest[key]
                newest[key] = end + 1

    def _add_many(self, tokens: IntArray, slots: Places, ends: Places) -> None:
        """The same for the tokens at `ends` [T] of `slots` [T], each slot's together and ascending.

        Grams that begin before the first token are entered too, as whatever lies there: no look-up believes them.
        """
        grams = tokens[slots[:, None], ends[:, None] + self._reach].astype(np.uint64)
        grams += np.uint64(1)
        grams *= self._powers
        keys = np.stack([grams[:, -order:].sum(axis=1) for order in self._orders])
        keys >>= np.uint64(_SHIFT)
        buckets = (keys.astype(np.int64) + slots * _BUCKETS + self._heads).reshape(-1)
        places = (slots * self._max_length + ends + self._tails).reshape(-1)
        newest, older, ends = self._newest.reshape(-1), self._older.reshape(-1), np.concatenate([ends, ends])
        if len(slots) > 1 and (slots[1:] == slots[:-1]).any():
            by_bucket = buckets.argsort(kind="stable")
            buckets, places, ends = buckets[by_bucket], places[by_bucket], ends[by_bucket]
            before = newest[buckets]
            again = np.flatnonzero(buckets[1:] == buckets[:-1])
            before[again + 1] = ends[again] + 1
            older[places] = before
        else:
            older[places] = newest[buckets]
        newest[buckets] = ends + 1  # of several ends in one bucket the last one stays


def _common(view: memoryview, first: int, second: int) -> int:
    """Tokens, at most `_ENOUGH`, that are equal going back from two positions, the first being the smaller."""
    length, limit = 0, min(_ENOUGH, first + 1)
    while length < limit and view[first - length] == view[second - length]:
        length += 1
    return length
