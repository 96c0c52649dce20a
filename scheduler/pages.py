"""`PagePool`: who may write which page. Ids only; the tensors behind them belong to the engine."""

import numpy as np

from ..core.plan import IntArray


class PagePool:
    """All pages of the KV cache as a stack of free ids: taking n pages is one slice."""

    def __init__(self, num_pages: int) -> None:
        assert num_pages >= 0
        self.total = num_pages
        self.free = num_pages
        """Pages that can be taken now."""
        self._stack = np.arange(num_pages, dtype=np.int32)
        """The first `free` ones are the free ids; what lies above is stale."""
        self._owned = np.zeros(num_pages, dtype=np.bool_)

    @property
    def used(self) -> int:
        """Pages in somebody's table."""
        return self.total - self.free

    def take(self, count: int) -> IntArray:
        """Lend `count` pages, int32 [count]; the caller has looked at `free` first."""
        assert 0 <= count <= self.free, f"{count} pages wanted, {self.free} free"
        self.free -= count
        ids = self._stack[self.free : self.free + count].copy()
        self._owned[ids] = True
        return ids

    def give(self, ids: IntArray) -> None:
        """Take pages back; AssertionError if one of them is not lent (`check` also sees a repeat inside `ids`)."""
        if not len(ids):
            return
        assert ids.min() >= 0 and ids.max() < self.total, "a page id out of range came back"
        assert self._owned[ids].all(), "a page came back that was free already"
        self._owned[ids] = False
        self._stack[self.free : self.free + len(ids)] = ids
        self.free += len(ids)

    def reset(self, owned: IntArray) -> None:
        """Begin anew with exactly the pages `owned` lent, each of them once."""
        self._owned[:] = False
        self._owned[owned] = True
        free = np.flatnonzero(~self._owned).astype(np.int32)
        self.free = len(free)
        self._stack[: self.free] = free

    def check(self) -> None:
        """AssertionError unless the free ids are in range, each there once, and all others are owned."""
        assert 0 <= self.free <= self.total
        free = self._stack[: self.free]
        assert not len(free) or (free.min() >= 0 and free.max() < self.total), "a free page id is out of range"
        assert len(np.unique(free)) == self.free, "a page is free twice"
        assert not self._owned[free].any(), "a free page is marked as owned"
        assert np.count_nonzero(self._owned) == self.used, "a page is neither free nor owned"

    def check_owned(self, ids: IntArray) -> None:
        """AssertionError unless `ids` are exactly the lent pages, each once (a page in two tables shows here)."""
        assert np.array_equal(np.sort(ids), np.flatnonzero(self._owned)), "tables and pool disagree on who owns what"
