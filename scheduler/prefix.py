"""`PrefixIndex`: blocks that were computed already, found by the tokens that lead up to them.

A block is `page_size` consecutive tokens; a bundle is the pages, one per head of each layer, that hold its keys and
values. They depend on all tokens before them, so a block is named by a hash over the sequence up to its end (as in
vLLM's automatic prefix caching; see also SGLang's RadixAttention, Zheng et al. 2024). Ids and counts only, no tensors.
"""

import struct
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from ..core.plan import IntArray

_STRIDE = 64
"""Blocks that `match` hashes at a time: converting tokens in bulk is cheap, hashing a prompt nobody knows is not."""


class BlockHashes:
    """Digests of a growing sequence's full blocks, each computed once, when it is first asked for.

    One SHA-256 runs over the sequence and is read at each block's end: digest i depends on the namespace and on all
    tokens up to there. Two prefixes never meet, not even by intent: a hit needs no comparison. Processors have
    instructions for SHA-256: with them it takes two thirds of BLAKE2b's time.
    """

    __slots__ = ("_block_size", "_digests", "_hasher", "_tokens")

    def __init__(self, namespace: tuple[object, ...], tokens: list[int], block_size: int) -> None:
        """`tokens` is the sequence's own list, which only grows; sequences of different `namespace` share nothing."""
        self._tokens = tokens
        self._block_size = block_size
        self._digests: list[bytes] = []
        self._hasher = sha256(repr(namespace).encode())

    def upto(self, count: int) -> list[bytes]:
        """The digests known, at least those of the first `count` blocks, which are full."""
        known, size = len(self._digests), self._block_size
        if known < count:
            assert count * size <= len(self._tokens), "a block that is not full has no digest"
            # Twice as fast as by an array.
            data = struct.pack(f"{(count - known) * size}i", *self._tokens[known * size : count * size])
            update, digest, append = self._hasher.update, self._hasher.digest, self._digests.append
            for (block,) in struct.iter_unpack(f"{4 * size}s", data):
                update(block)
                append(digest())
        return self._digests


@dataclass(slots=True, eq=False)
class Bundle:
    """The pages of one computed block. Never written again."""

    digest: bytes
    pages: IntArray
    """One per head, int32 [R]."""
    users: int
    """Sequences that have it in their table."""


class PrefixIndex:
    """Computed blocks by digest. Those that no sequence uses are kept until their pages are reclaimed.

    Reclaimed is the least recently used first, and of one prefix the deepest block first, for without what comes before
    it a block is never found.
    """

    def __init__(self, pages_per_bundle: int) -> None:
        self._pages_per_bundle = pages_per_bundle
        self._bundles: dict[bytes, Bundle] = {}
        self._idle: OrderedDict[bytes, Bundle] = OrderedDict()
        """Without users, least recently used first."""

    @property
    def num_idle_pages(self) -> int:
        """Pages that `reclaim` can give."""
        return len(self._idle) * self._pages_per_bundle

    def __iter__(self) -> Iterator[Bundle]:
        return iter(self._bundles.values())

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
        if not bundle.users:
            del self._idle[bundle.digest]
        bundle.users += 1

    def release(self, bundle: Bundle) -> bool:
        """One user less. False if the bundle was withdrawn and this was the last: the pages are the caller's then.

        A sequence releases its deepest block first.
        """
        assert bundle.users > 0, "a bundle was released that nobody uses"
        bundle.users -= 1
        if bundle.users:
            return True
        if self._bundles.get(bundle.digest) is not bundle:
            return False
        self._idle[bundle.digest] = bundle
        return True

    def touch(self, digest: bytes) -> None:
        """Count the block, if it is known, as used just now."""
        if digest in self._idle:
            self._idle.move_to_end(digest)

    def publish(self, digest: bytes, pages: IntArray) -> Bundle | None:
        """Take over a computed block's pages from their one user; None if another's copy is known already."""
        if digest in self._bundles:
            return None
        assert len(pages) == self._pages_per_bundle
        bundle = self._bundles[digest] = Bundle(digest, pages, users=1)
        return bundle

    def withdraw(self, bundle: Bundle) -> None:
        """Let nobody find the bundle any more; it lives until its present users (one at least) release it."""
        assert bundle.users > 0
        if self._bundles.get(bundle.digest) is bundle:
            del self._bundles[bundle.digest]

    def reclaim(self, count: int) -> IntArray:
        """Forget idle blocks that hold at least `count` pages, fewer if there are no more; returns their pages."""
        freed: list[IntArray] = []
        while self._idle and len(freed) * self._pages_per_bundle < count:
            digest, bundle = self._idle.popitem(last=False)
            del self._bundles[digest]
            freed.append(bundle.pages)
        return np.concatenate(freed) if freed else np.empty(0, np.int32)

    def forget_used(self) -> None:
        """Forget all blocks that count users."""
        self._bundles = dict(self._idle)

    def check(self) -> None:
        """AssertionError unless exactly the unused blocks are idle."""
        assert all(bundle.digest == digest for digest, bundle in self._bundles.items())
        assert self._idle.keys() == {bundle.digest for bundle in self if not bundle.users}
        assert all(self._bundles[digest] is bundle for digest, bundle in self._idle.items())
