"""`RemovalHeap`: items by key, smallest first, from which any item can be taken."""

import itertools
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import Any, Generic, TypeVar

Name = TypeVar("Name", int, str)
Item = TypeVar("Item")


class RemovalHeap(Generic[Name, Item]):
    """A binary heap with a name per item. All operations are O(log n), amortised.

    A removed item stays in the heap until it comes up; once most of the heap is such remains it is rebuilt, so that a
    wave of removals holds no memory.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Any, Name, int, Item]] = []
        """(key, name, serial number, item); the number is unique, so items are never compared."""
        self._present: dict[Name, tuple[Any, Name, int, Item]] = {}
        self._serial = itertools.count()

    def __len__(self) -> int:
        return len(self._present)

    def __contains__(self, name: Name) -> bool:
        return name in self._present

    def __iter__(self) -> Iterator[Item]:
        """All items, in no particular order."""
        return (item for _, _, _, item in self._present.values())

    def push(self, name: Name, key: Any, item: Item) -> None:
        """Put an item in, or give the one of that name another key. Keys must be comparable with each other."""
        entry = (key, name, next(self._serial), item)
        self._present[name] = entry
        heappush(self._heap, entry)
        self._tidy()

    def first(self) -> tuple[Any, Name, Item] | None:
        """Key, name and item of the smallest key (of equal ones, of the smallest name); None if there is nothing."""
        while self._heap and self._present.get(self._heap[0][1]) is not self._heap[0]:
            heappop(self._heap)
        if not self._heap:
            return None
        key, name, _, item = self._heap[0]
        return key, name, item

    def remove(self, name: Name) -> bool:
        """Take an item out; False if it is not there."""
        found = self._present.pop(name, None) is not None
        self._tidy()
        return found

    def _tidy(self) -> None:
        if len(self._heap) > 2 * len(self._present) + 16:
            self._heap = list(self._present.values())
            heapify(self._heap)
