"""`Pins`: prefixes that requests asked to keep for a time, at most so many."""

import heapq
import itertools
import math
from collections.abc import Callable, Iterator

from ..core.prefix import Bundle, PrefixIndex
from .config import SchedulerConfig
from .host_tier import HostTier
from .sequence import SequenceState


class Pins:
    """Pinned bundles by the time at which they may go, marked by `Bundle.pinned` in index and host tier."""

    def __init__(self, config: SchedulerConfig, index: PrefixIndex, host: HostTier, clock: Callable[[], float]) -> None:
        """`clock` gives seconds."""
        self._config = config
        self._index = index
        self._host = host
        self._clock = clock
        self._until: dict[Bundle, float] = {}
        self._queue: list[tuple[float, int, Bundle]] = []
        """(end, tie-breaker, bundle), soonest first; entries whose bundle has another end by now are stale."""
        self._numbers = itertools.count()
        self.num_pages = 0
        """Of pinned prefixes, in use or not, on the device or not."""
        self.dropped = 0
        """Pinned bundles that went before their time, for a sequence that could not have gone on alone."""

    def pin(self, sequence: SequenceState) -> None:
        """Once its prompt is computed: keep the prompt's full blocks for as long after it as its request asks for.

        From the first block on, as many as may still be pinned; of a prompt that begins with a pruned prefix, that.
        """
        if sequence.pinned_tokens is not None or sequence.num_computed < sequence.num_prompt:
            return
        sequence.pinned_tokens = 0
        if not (sequence.request.cache_ttl and sequence.shares and self._config.prefix_cache):
            return
        for digest, tokens in self._prefixes(sequence):
            bundle = self._index.get(digest)
            if bundle is None or not self._hold(bundle, self._end(sequence)):
                break
            sequence.pinned.append(digest)
            sequence.pinned_tokens += tokens

    def _prefixes(self, sequence: SequenceState) -> Iterator[tuple[bytes, int]]:
        """Names of what the sequence's prompt begins with, and the tokens of each."""
        key, prune = sequence.pruned_key, sequence.prune
        if key is not None and prune is not None and self._index.get(key) is not None:
            yield key, prune.prefill_end
            return
        full = sequence.num_prompt // self._config.page_size
        for digest in sequence.hashes.upto(full)[:full]:
            yield digest, self._config.page_size

    def prolong(self, sequence: SequenceState) -> None:
        """The sequence leaves: its pins count from now."""
        for digest in sequence.pinned:
            bundle = self._index.get(digest)
            if bundle in self._until:
                self._hold(bundle, self._end(sequence))

    def forget(self, bundle: Bundle) -> None:
        """The bundle is gone."""
        if self._until.pop(bundle, None) is not None:
            self.num_pages -= bundle.size

    def expire(self) -> None:
        """Unpin what was kept long enough."""
        if self._until:
            now = self._clock()
            while (bundle := self._pop(now)) is not None:
                self._unpin(bundle)

    def drop(self) -> bool:
        """Unpin what ends soonest, for room; False if nothing is pinned."""
        bundle = self._pop()
        if bundle is None:
            return False
        self._unpin(bundle)
        self.dropped += 1
        return True

    def clear(self) -> None:
        """Unpin everything."""
        while (bundle := self._pop()) is not None:
            self._unpin(bundle)

    def check(self) -> None:
        """AssertionError unless the marks are right, and not too many."""
        assert all((bundle in self._until) == bundle.pinned for bundle in self._index)
        assert len(self._until) == sum(bundle.pinned for bundle in self._index)
        assert self.num_pages == sum(bundle.size for bundle in self._until) <= self._config.max_pinned

    def _end(self, sequence: SequenceState) -> float:
        return self._clock() + min(sequence.request.cache_ttl, self._config.max_cache_ttl)

    def _hold(self, bundle: Bundle, until: float) -> bool:
        """Pin the bundle at least until clock time `until` (seconds); False if no more may be pinned."""
        if bundle not in self._until:
            if self.num_pages + bundle.size > self._config.max_pinned:
                return False
            self.num_pages += bundle.size
            self._index.pin(bundle)
            self._host.pin(bundle)
        if until > self._until.get(bundle, -math.inf):
            self._until[bundle] = until
            heapq.heappush(self._queue, (until, next(self._numbers), bundle))
        return True

    def _pop(self, now: float | None = None) -> Bundle | None:
        """End the pin that ends soonest and return its bundle; with `now`, only if its time has come."""
        while self._queue:
            until, _, bundle = self._queue[0]
            current = self._until.get(bundle) == until
            if current and now is not None and until > now:
                return None
            heapq.heappop(self._queue)
            if current:
                del self._until[bundle]
                self.num_pages -= bundle.size
                return bundle
        return None

    def _unpin(self, bundle: Bundle) -> None:
        self._index.unpin(bundle)
        self._host.touch(bundle)
