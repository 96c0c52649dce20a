"""`PageTable`: the pages of one sequence and how many entries each head keeps in them.

Rows are heads: row = layer * K + kv head, R = L * K of them. B is the page size.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..core.plan import IntArray

NO_WINDOW = 2**30
"""Window of a full-attention layer: larger than any context."""


def pages_of(entries: IntArray, page_size: int) -> int:
    """Pages that heads with so many entries [R] take."""
    return int((-(-entries // page_size)).sum())


class PageTable:
    """Pages and kept lengths of one sequence, head by head: heads may keep different numbers of entries.

    Appending costs two integers as long as there is `room`; arrays are touched only when some head needs a page.
    """

    __slots__ = ("_held", "_kept", "_page_size", "_pages", "appended", "borrowed", "num_pages", "ragged", "room")

    def __init__(self, num_rows: int, page_size: int) -> None:
        self._page_size = page_size
        self._pages: IntArray = np.empty((num_rows, 0), np.int32)
        """[R, capacity]; columns from `held` on are stale."""
        self._held: IntArray = np.zeros(num_rows, np.int32)
        """[R] pages of each head."""
        self._kept: IntArray = np.zeros(num_rows, np.int32)
        """[R] entries of each head, without the last `appended`."""
        self.borrowed: IntArray = np.zeros(num_rows, np.int32)
        """[R] leading pages of each head that belong to a pruned prefix."""
        self.ragged = False
        """Whether heads may hold different numbers of pages or entries."""
        self.appended = 0
        """Entries of every head that `_kept` does not count yet."""
        self.num_pages = 0
        """Pages of all heads together."""
        self.room = 0
        """Entries that can surely be appended before any head needs a page (0 also asks for a fresh look)."""

    @property
    def kept(self) -> IntArray:
        """Entries of each head, int32 [R]."""
        return self._kept + np.int32(self.appended)

    @property
    def held(self) -> IntArray:
        """Pages of each head, int32 [R]."""
        return self._held.copy()

    def adopt(self, pages: IntArray) -> None:
        """Begin with `pages` [R, C], all full; the table is empty."""
        assert not self.num_pages and not self._kept.any() and not self.appended
        columns = pages.shape[1]
        self._reserve(columns)
        self._pages[:, :columns] = pages
        self._held[:] = columns
        self._kept[:] = columns * self._page_size
        self.num_pages = pages.size
        self.room = 0

    def restore(self, held: IntArray, kept: IntArray, shared: list[int], columns: IntArray, own: IntArray) -> None:
        """Be again what `held` and `kept` [R] said; the table is empty.

        `columns` [R, len(shared)] are the pages of the columns `shared`; `own` [n] all others, in the order of `ids`.
        """
        assert not self.num_pages and not self._kept.any() and not self.appended
        self._reserve(int(held.max(initial=0)))
        self._held[:], self._kept[:] = held, kept
        self._pages[self._taken(shared)] = own
        self._pages[:, shared] = columns
        self.ragged = bool((held != held[0]).any() or (kept != kept[0]).any())
        self.num_pages, self.room = int(held.sum()), 0

    def places(self) -> tuple[IntArray, IntArray, IntArray]:
        """(rows, columns, pages) of the whole table, int32 [num_pages] each, head by head."""
        rows, columns = np.nonzero(self._taken())
        return rows.astype(np.int32), columns.astype(np.int32), self._pages[rows, columns]

    def column(self, index: int) -> IntArray:
        """Every head's page number `index`, int32 [R]; all heads have one."""
        return self._pages[:, index].copy()

    def append(self, count: int) -> None:
        """`count` entries were written for every head."""
        assert count <= self.room, "entries were written past the last page"
        self.appended += count
        self.room -= count

    def lacking(self, count: int) -> IntArray:
        """Pages that each head lacks to take `count` more entries, int32 [R]."""
        wanted = -(-(self.kept + np.int32(count)) // self._page_size)
        return np.maximum(wanted - self._held, 0)

    def grow(self, lacking: IntArray, ids: IntArray) -> tuple[IntArray, IntArray]:
        """Hang in new pages `ids` [sum(lacking)], `lacking` [R] of them per head.

        Returns (rows, columns), int32, parallel to `ids`; refreshes `room`.
        """
        rows = np.repeat(np.arange(len(lacking), dtype=np.int32), lacking)
        before = np.cumsum(lacking) - lacking
        columns = (self._held[rows] + np.arange(len(ids)) - before[rows]).astype(np.int32)
        self._held += lacking
        self._reserve(int(self._held.max()))
        self._pages[rows, columns] = ids
        self.num_pages += len(ids)
        self.room = int((self._held * self._page_size - self.kept).min())
        return rows, columns

    def add_column(self, ids: IntArray) -> int:
        """Hang in one page `ids` [R] at each head of a table that is not ragged; returns its column.

        The same as `grow`, for the commonest case.
        """
        assert not self.ragged
        column = int(self._held[0])
        self._reserve(column + 1)
        self._pages[:, column] = ids
        self._held += 1
        self.num_pages += len(ids)
        self.room += self._page_size
        return column

    def drop_unseen(self, windows: IntArray) -> tuple[list[tuple[IntArray, int]], IntArray]:
        """Unhang the leading pages that no query from now on can see; windows [R], `NO_WINDOW` for full attention.

        Entry i of k kept ones lies at least k - i positions before the next query, pruned or not, and is seen only
        within the window. Returns [(rows, pages per row)], and the ids that fell free.
        """
        unseen = np.maximum(self.kept - windows + 1, 0) // self._page_size
        groups, freed = [], []
        for count in map(int, np.unique(unseen[unseen > 0])):
            rows = np.flatnonzero(unseen == count).astype(np.int32)
            freed.append(self._pages[rows, :count].ravel())
            self._pages[rows, : self._pages.shape[1] - count] = self._pages[rows, count:]
            self._held[rows] -= count
            self._kept[rows] -= count * self._page_size
            groups.append((rows, count))
            self.ragged = True
        ids = np.concatenate(freed) if freed else np.empty(0, np.int32)
        self.num_pages -= len(ids)
        return groups, ids

    def compact(self, counts: IntArray) -> IntArray:
        """Every head keeps `counts` [R] entries, in its own leading pages; returns the ids that fell free."""
        assert (counts <= self.kept).all(), "a head cannot keep more than it has"
        assert not self.borrowed.any(), "a pruned prefix cannot be compacted in place"
        held = -(-counts // self._page_size)
        columns = np.arange(self._pages.shape[1])
        freed = self._pages[(columns >= held[:, None]) & (columns < self._held[:, None])]
        self._settle(counts, held)
        return freed

    def trim(self, count: int) -> IntArray:
        """Unhang the pages that `count` more entries do not need; returns the ids that fell free, perhaps none."""
        held = np.minimum(-(-(self.kept + np.int32(count)) // self._page_size), self._held)
        columns = np.arange(self._pages.shape[1])
        freed = self._pages[(columns >= held[:, None]) & (columns < self._held[:, None])]
        if len(freed):
            self._held[:] = held
            self.num_pages -= len(freed)
            self.room = int((held * self._page_size - self.kept).min())
        return freed

    def rebuild(self, counts: IntArray, ids: IntArray) -> None:
        """The empty table holds `counts` [R] entries in the pages `ids`, ceil(count / B) per head, head after head."""
        assert not self.num_pages
        held = -(-counts // self._page_size)
        self._reserve(int(held.max()))
        self._pages[np.arange(self._pages.shape[1]) < held[:, None]] = ids
        self._settle(counts, held)

    def _settle(self, counts: IntArray, held: IntArray) -> None:
        self._held[:] = held
        self._kept[:] = counts
        self.appended = 0
        self.ragged = bool((counts != counts[0]).any())
        self.num_pages = int(held.sum())
        self.room = int((held * self._page_size - counts).min())

    def ids(self, without: Sequence[int] = ()) -> IntArray:
        """All pages of the table but those in the columns `without`, int32 [num_pages - len(without) * R]."""
        return self._pages[self._taken(without)]

    def own(self, without: Sequence[int] = ()) -> IntArray:
        """The same without the `borrowed` ones."""
        return self._pages[self._taken(without) & (np.arange(self._pages.shape[1]) >= self.borrowed[:, None])]

    def _taken(self, without: Sequence[int] = ()) -> npt.NDArray[np.bool_]:
        """Which cells hold pages, but for the columns `without`; bool [R, capacity]."""
        taken = np.arange(self._pages.shape[1]) < self._held[:, None]
        taken[:, list(without)] = False
        return taken

    def clear(self, without: Sequence[int] = ()) -> IntArray:
        """Forget everything; returns the ids of all pages but those borrowed, and those in the columns `without`."""
        ids = self.own(without)
        assert len(ids) == self.num_pages - len(without) * len(self._held) - self.borrowed.sum()
        self._pages = np.empty((len(self._held), 0), np.int32)
        self._held[:] = 0
        self._kept[:] = 0
        self.borrowed[:] = 0
        self.ragged = False
        self.appended = self.num_pages = self.room = 0
        return ids

    def _reserve(self, columns: int) -> None:
        """Widen the array so that a head can hold `columns` pages; doubling keeps this rare."""
        rows, capacity = self._pages.shape
        if columns > capacity:
            wider = np.empty((rows, max(columns, 2 * capacity)), np.int32)
            wider[:, :capacity] = self._pages
            self._pages = wider
