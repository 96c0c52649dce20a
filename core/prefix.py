"""`PrefixIndex`: blocks that were computed already, found by the tokens that lead up to them.

A block is `page_size` consecutive tokens; a bundle is the pages, one per head of each layer, that hold its keys and
values. They depend on all tokens before them, so a block is named by a hash over the sequence up to its end (as in
vLLM's automatic prefix caching; see also SGLang's RadixAttention, Zheng et al. 2024). What is left of a pruned context
(`scheduler.pruned_prefix`) is one bundle too, with pages of unequal number. Ids and counts only, no tensors. The
scheduler has an index of the target's blocks, a draft model's cache one of its own.
"""

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from .plan import IntArray

_STRIDE = 64
"""Blocks that `match` hashes at a time: converting tokens in bulk is cheap, hashing a prompt nobody knows is not."""


class BlockHashes:
    """Digests of a growing sequence's full blocks, each computed once, when it is first asked for.

    One SHA-256 runs over the sequence and is read at each block's end: digest i depends on the namespace and on all
    tokens up to there. Two prefixes never meet, not even by intent: a hit needs no comparison. Processors have
    instructions for SHA-256: with them it takes two thirds of BLAKE2b's time.
    """

    __slots__ = ("_block_size", "_digests", "_hasher", "_tokens")

    def __init__(self, namespace: tuple[object, ...], tokens: list[int] | IntArray, block_size: int) -> None:
        """`tokens` is the sequence's own list, which only grows, or an array that fills up; sequences of different
        `namespace` share nothing."""
        self._tokens = tokens
        self._block_size = block_size
        self._digests: list[bytes] = []
        self._hasher = sha256(repr(namespace).encode())

    def upto(self, count: int) -> list[bytes]:
        """The digests known, at least those of the first `count` blocks, which are full."""
        known, size = len(self._digests), self._block_size
        if known < count:
            assert count * size <= len(self._tokens), "a block that is not full has no digest"
            tokens = self._tokens[known * size : count * size]
            # A list is packed twice as fast as by an array.
            data = struct.pack(f"{len(tokens)}i", *tokens) if isinstance(tokens, list) else tokens.tobytes()
            update, digest, append = self._hasher.update, self._hasher.digest, self._digests.append
            for (block,) in struct.iter_unpack(f"{4 * size}s", data):
                update(block)
                append(digest())
        return self._digests


@dataclass(slots=True, eq=False)
class Bundle:
    """The pages of one computed block, on the device, in host memory or in both. Never written again.

    Or those of a pruned prefix, which has `kept`.
    """

    digest: bytes
    pages: IntArray | None
    """One per head, int32 [R], or ceil(kept / B) per head, head after head; None: it is in host memory alone."""
    users: int
    """Sequences that have it in their table."""
    host: IntArray | None = None
    """Host pages of its copy there, as many."""
    pinned: bool = False
    """Not to be reclaimed, on neither side."""
    kept: IntArray | None = None
    """Entries that each head of a pruned prefix keeps, int32 [R]; None: it is a block."""

    @property
    def size(self) -> int:
        """Number of its pages."""
        pages = self.host if self.pages is None else self.pages
        return 0 if pages is None else len(pages)


class Shelf:
    """Bundles that nobody uses, by digest and in order, and how many pages they are."""

    def __init__(self) -> None:
        self._bundles: OrderedDict[bytes, Bundle] = OrderedDict()
        self.num_pages = 0

    def __len__(self) -> int:
        return len(self._bundles)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._bundles

    def __iter__(self) -> Iterator[Bundle]:
        return iter(self._bundles.values())

    def put(self, bundle: Bundle) -> None:
        """At the end; it is not here yet."""
        assert bundle.digest not in self._bundles
        self._bundles[bundle.digest] = bundle
        self.num_pages += bundle.size

    def take(self, bundle: Bundle) -> bool:
        """Take the bundle away; False if it was not here."""
        if self._bundles.get(bundle.digest) is not bundle:
            return False
        del self._bundles[bundle.digest]
        self.num_pages -= bundle.size
        return True

    def take_first(self) -> Bundle:
        """Take away the first."""
        _, bundle = self._bundles.popitem(last=False)
        self.num_pages -= bundle.size
        return bundle

    def to_end(self, digest: bytes) -> None:
        """The bundle comes last now, if it is here."""
        if digest in self._bundles:
            self._bundles.move_to_end(digest)

    def check(self, bundles: Iterable[Bundle]) -> None:
        """AssertionError unless exactly these are here."""
        bundles = list(bundles)
        assert self._bundles.keys() == {bundle.digest for bundle in bundles}
        assert all(self._bundles[bundle.digest] is bundle for bundle in bundles)
        assert self.num_pages == sum(bundle.size for bundle in bundles)


class PrefixIndex:
    """Computed blocks by digest. Those that no sequence uses are kept until their pages are reclaimed.

    Reclaimed is the least recently used first, and of one prefix the deepest block first, for without what comes before
    it a block is never found.
    """

    def __init__(self, pages_per_bundle: int, keeps_idle: bool = True) -> None:
        """Without `keeps_idle`, a block is known only as long as somebody uses it."""
        self._pages_per_bundle = pages_per_bundle
        self._keeps_idle = keeps_idle
        self._bundles: dict[bytes, Bundle] = {}
        self._idle = Shelf()
        """On the device, without users and not pinned: least recently used first."""
        self._held = Shelf()
        """On the device, without users but pinned."""

    @property
    def num_idle_pages(self) -> int:
        """Pages that `reclaim` can give."""
        return self._idle.num_pages

    @property
    def num_held_pages(self) -> int:
        """Pages without users that `reclaim` must not give."""
        return self._held.num_pages

    def __len__(self) -> int:
        return len(self._bundles)

    def __iter__(self) -> Iterator[Bundle]:
        return iter(self._bundles.values())

    def get(self, digest: bytes) -> Bundle | None:
        """The block of that name, if it is known."""
        return self._bundles.get(digest)

    def idle(self) -> list[Bundle]:
        """Blocks on the device that nobody uses: the next to be reclaimed first, pinned ones last."""
        return [*self._idle, *reversed([*self._held])]

    def match(self, hashes: BlockHashes, limit: int) -> list[Bundle]:
        """The longest run of known blocks from the first on, at most `limit`; changes nothing."""
        found: list[Bundle] = []
        for start in range(0, limit, _STRIDE):
            end = min(start + _STRIDE, limit)
            for digest in hashes.upto(end)[start:end]:
                bundle = self._bundles.get(digest)
                if bundle is None:
                    return found
                found.append(bundle)
        return found

    def acquire(self, bundle: Bundle) -> None:
        """One more user."""
        if not bundle.users and bundle.pages is not None:
            (self._held if bundle.pinned else self._idle).take(bundle)
        bundle.users += 1

    def release(self, bundle: Bundle) -> bool:
        """One user less. False if this was the last and nobody can find the bundle: the pages are the caller's then.

        A sequence releases its deepest block first.
        """
        assert bundle.users > 0, "a bundle was released that nobody uses"
        bundle.users -= 1
        if bundle.users:
            return True
        if self._bundles.get(bundle.digest) is not bundle:
            return False
        if not self._keeps_idle:
            del self._bundles[bundle.digest]
            return False
        self._rest(bundle)
        return True

    def _rest(self, bundle: Bundle) -> None:
        """Nobody uses the bundle's device pages for now."""
        (self._held if bundle.pinned else self._idle).put(bundle)

    def touch(self, digest: bytes) -> None:
        """Count the block, if it is known, as used just now."""
        self._idle.to_end(digest)

    def publish(self, digest: bytes, pages: IntArray) -> Bundle | None:
        """Take over a computed block's pages from their one user; None if another's copy is on the device already."""
        assert len(pages) == self._pages_per_bundle
        bundle = self._bundles.setdefault(digest, Bundle(digest, None, users=0))
        if bundle.pages is not None:
            return None
        bundle.pages, bundle.users = pages, 1
        return bundle

    def adopt(self, bundle: Bundle) -> None:
        """Take over a bundle that is complete, which must be unknown: of an earlier run, or a pruned prefix."""
        assert bundle.digest not in self._bundles
        self._bundles[bundle.digest] = bundle
        if bundle.pages is not None and not bundle.users:
            self._rest(bundle)

    def pin(self, bundle: Bundle) -> None:
        """Keep the block from being reclaimed."""
        bundle.pinned = True
        if self._idle.take(bundle):
            self._rest(bundle)

    def unpin(self, bundle: Bundle) -> None:
        """Let the block be reclaimed again, as one that was used just now."""
        bundle.pinned = False
        if self._held.take(bundle):
            self._rest(bundle)

    def withdraw(self, bundle: Bundle) -> None:
        """Let nobody find the bundle any more; it lives until its present users (one at least) release it."""
        assert bundle.users > 0
        if self._bundles.get(bundle.digest) is bundle:
            del self._bundles[bundle.digest]

    def reclaim(self, count: int, spill: Callable[[Bundle], None] | None = None) -> IntArray:
        """Take idle blocks off the device that hold at least `count` pages, fewer if there are no more.

        Each is first given to `spill`, if there is one, which may set its `host`; without a copy there it is
        forgotten. Returns the pages.
        """
        freed: list[IntArray] = []
        enough = self._idle.num_pages - count
        while len(self._idle) and self._idle.num_pages > enough:
            bundle = self._idle.take_first()
            if spill is not None:
                spill(bundle)
            assert bundle.pages is not None
            freed.append(bundle.pages)
            bundle.pages = None
            self.forget_if_gone(bundle)
        return np.concatenate(freed) if freed else np.empty(0, np.int32)

    def forget_if_gone(self, bundle: Bundle) -> None:
        """A copy of the block was given up: without any, nobody can begin with it."""
        if bundle.pages is None and bundle.host is None and self._bundles.get(bundle.digest) is bundle:
            del self._bundles[bundle.digest]

    def used(self) -> list[Bundle]:
        """Blocks that count users."""
        return [bundle for bundle in self._bundles.values() if bundle.users]

    def check(self) -> None:
        """AssertionError unless exactly the unused blocks are idle."""
        assert all(bundle.digest == digest for digest, bundle in self._bundles.items())
        resting = [bundle for bundle in self if not bundle.users and bundle.pages is not None]
        self._idle.check(bundle for bundle in resting if not bundle.pinned)
        self._held.check(bundle for bundle in resting if bundle.pinned)
        assert all(bundle.pages is not None or bundle.host is not None for bundle in self), "a block without pages"


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A computed prefix block that no sequence uses, to be kept in a file or to come from one."""

    digest: bytes
    pages: IntArray
    """One per head, int32 [R]."""
    in_host: bool
    """Whether they are pages of the host pool."""
