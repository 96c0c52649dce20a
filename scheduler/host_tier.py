"""`HostTier`: which page of the host pool holds what. Prefixes that left the device, and swapped-out sequences.

The host pool has pages of the device's shape. A prefix that is brought back keeps its copy here, so that it need not be
copied out again; copies go least recently used first when room is short. A swapped-out sequence keeps its pages until
it comes back or ends.
"""

from collections.abc import Callable, Iterable

import numpy as np

from ..core.plan import IntArray, PageCopies
from ..core.prefix import Bundle, Shelf
from .pages import PagePool


class HostTier:
    """Lends host pages, and collects what the next plan copies. Always free + parked + cached = all pages."""

    def __init__(self, num_pages: int, pages_per_bundle: int, on_evict: Callable[[Bundle], None]) -> None:
        """`on_evict` hears of each bundle that lost its copy here."""
        self._pool = PagePool(num_pages)
        self._pages_per_bundle = pages_per_bundle
        self._on_evict = on_evict
        self._copies = Shelf()
        """Copies that may be given up, least recently used first."""
        self._pinned = Shelf()
        """Copies that stay."""
        self._read: dict[Bundle, None] = {}
        """Copies that the next plan reads, deepest last: not to be overwritten by it."""
        self._written: dict[Bundle, None] = {}
        """Copies that it writes: not to be written twice. Shallowest last."""
        self._returning: list[IntArray] = []
        """The same of sequences; free after the plan."""
        self._outs: list[tuple[IntArray, IntArray]] = []
        self._ins: list[tuple[IntArray, IntArray]] = []
        self.parked = 0
        """Pages of swapped-out sequences."""
        self.pages_out = 0
        """Pages copied here so far."""
        self.pages_in = 0
        """Pages copied back so far."""

    @property
    def total(self) -> int:
        """Pages of the host pool; 0 switches it off."""
        return self._pool.total

    @property
    def cached(self) -> int:
        """Pages of prefixes."""
        return self._pool.used - self.parked

    def fits(self, count: int) -> bool:
        """Whether so many pages can be had."""
        return count <= self._pool.free + self._copies.num_pages

    def _take(self, count: int) -> IntArray | None:
        """`count` pages, at the cost of the least recently used copies; None if there is no room."""
        if not self.fits(count):
            return None
        while self._pool.free < count:
            self._drop(self._copies.take_first())
        return self._pool.take(count)

    def _drop(self, bundle: Bundle) -> None:
        assert bundle.host is not None
        self._pool.give(bundle.host)
        bundle.host = None
        self._on_evict(bundle)

    # --- prefixes ---

    def spill(self, bundle: Bundle) -> None:
        """The bundle is about to leave the device: copy it here if there is room, unless it has a copy."""
        assert bundle.pages is not None
        if bundle.host is None:
            bundle.host = self._take(bundle.size)
            if bundle.host is None:
                return
            self._copy_out(bundle.pages, bundle.host)
            self._written[bundle] = None
        self.touch(bundle)

    def touch(self, bundle: Bundle) -> None:
        """Count the bundle's copy, if it has one, as used just now."""
        if bundle.host is None or bundle in self._read or bundle in self._written:
            return
        self._pinned.take(bundle)
        self._copies.take(bundle)
        (self._pinned if bundle.pinned else self._copies).put(bundle)

    def reserve(self, bundles: Iterable[Bundle]) -> None:
        """The next plan reads these bundles' copies."""
        for bundle in bundles:
            self._copies.take(bundle)
            self._pinned.take(bundle)
            self._read[bundle] = None

    def recall(self, bundle: Bundle) -> None:
        """Copy a reserved bundle into the device pages that it has got."""
        assert bundle.pages is not None and bundle.host is not None
        self._copy_in(bundle.pages, bundle.host)

    def adopt(self) -> IntArray | None:
        """Pages for one more bundle, if they are free; nothing goes for it."""
        return self._pool.take(self._pages_per_bundle) if self._pool.free >= self._pages_per_bundle else None

    def stored(self) -> list[Bundle]:
        """Bundles with a copy here: the next to be given up first, pinned ones last."""
        return [*self._copies, *reversed([*self._pinned])]

    def pin(self, bundle: Bundle) -> None:
        """The bundle is pinned now: its copy stays."""
        if self._copies.take(bundle):
            self._pinned.put(bundle)

    def forget(self, bundle: Bundle) -> None:
        """Nobody can find the bundle any more."""
        assert bundle not in self._read and bundle not in self._written, "a prefix was withdrawn within a plan"
        if bundle.host is not None:
            self._copies.take(bundle)
            self._pinned.take(bundle)
            self._pool.give(bundle.host)
            bundle.host = None

    def drop_copies(self) -> None:
        """Give up every copy."""
        while len(self._copies):
            self._drop(self._copies.take_first())

    # --- sequences ---

    def park(self, pages: IntArray) -> IntArray | None:
        """Copy a sequence's device pages here; returns the host pages, None if there is no room."""
        host = self._take(len(pages))
        if host is not None:
            self.parked += len(host)
            self._copy_out(pages, host)
        return host

    def unpark(self, pages: IntArray, host: IntArray) -> None:
        """Copy a sequence's host pages back; they are free once the next plan is made."""
        self._copy_in(pages, host)
        self._returning.append(host)

    def discard(self, host: IntArray) -> None:
        """The sequence does not come back."""
        if any(host is written for _, written in self._outs):
            self._returning.append(host)
            return
        self.parked -= len(host)
        self._pool.give(host)

    # --- the plan ---

    def _copy_out(self, device: IntArray, host: IntArray) -> None:
        self._outs.append((device, host))
        self.pages_out += len(device)

    def _copy_in(self, device: IntArray, host: IntArray) -> None:
        self._ins.append((device, host))
        self.pages_in += len(device)

    def take_copies(self) -> tuple[PageCopies, PageCopies]:
        """(to the host, from the host) of the plan that is made now. What it reads may be overwritten by later ones."""
        outs, ins = _joined(self._outs), _joined(self._ins)
        self._outs, self._ins = [], []
        busy = [*self._written, *reversed(self._read)]
        self._read.clear()
        self._written.clear()
        for bundle in busy:
            self.touch(bundle)
        returning, self._returning = self._returning, []
        for host in returning:
            self.discard(host)
        return outs, ins

    def check(self, parked: list[IntArray], bundles: Iterable[Bundle]) -> None:
        """AssertionError unless exactly the pages of the `parked` sequences and of the known bundles are lent."""
        self._pool.check()
        copies = [bundle for bundle in bundles if bundle.host is not None]
        self._copies.check(bundle for bundle in copies if not bundle.pinned)
        self._pinned.check(bundle for bundle in copies if bundle.pinned)
        assert not self._read and not self._written and not self._returning, "a plan was made without taking its copies"
        owned = [*parked, *(bundle.host for bundle in copies if bundle.host is not None)]
        assert self.parked == sum(map(len, parked))
        self._pool.check_owned(np.concatenate(owned) if owned else np.empty(0, np.int32))


def _joined(copies: list[tuple[IntArray, IntArray]]) -> PageCopies:
    if not copies:
        return PageCopies.none()
    device, host = (np.concatenate(parts) for parts in zip(*copies, strict=True))
    return PageCopies(device, host)
