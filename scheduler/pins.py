"""`Pins`: prefixes that a request asked to keep for a time, at most so many."""

import heapq
import itertools
import math

from .prefix import Bundle


class Pins:
    """Pinned bundles by the time at which they may go. Marks bundles by `Bundle.pinned`; lists are others' work."""

    def __init__(self, limit: int) -> None:
        """At most `limit` bundles at a time."""
        self._limit = limit
        self._until: dict[Bundle, float] = {}
        self._queue: list[tuple[float, int, Bundle]] = []
        """(end, tie-breaker, bundle), soonest first; entries whose bundle has another end by now are stale."""
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._until)

    def hold(self, bundle: Bundle, until: float) -> bool:
        """Pin the bundle at least until clock time `until` (seconds); False if no more may be pinned."""
        if bundle not in self._until and len(self._until) >= self._limit:
            return False
        if until > self._until.get(bundle, -math.inf):
            self._until[bundle] = until
            heapq.heappush(self._queue, (until, next(self._numbers), bundle))
        return True

    def holds(self, bundle: Bundle) -> bool:
        """Whether the bundle is pinned."""
        return bundle in self._until

    def forget(self, bundle: Bundle) -> None:
        """The bundle is gone."""
        self._until.pop(bundle, None)

    def pop(self, now: float | None = None) -> Bundle | None:
        """End the pin that ends soonest and return its bundle; with `now`, only if its time has come."""
        while self._queue:
            until, _, bundle = self._queue[0]
            current = self._until.get(bundle) == until
            if current and now is not None and until > now:
                return None
            heapq.heappop(self._queue)
            if current:
                del self._until[bundle]
                return bundle
        return None
