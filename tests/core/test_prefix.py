"""The prefix index: what is found, by whom it is used, and what goes first."""

import numpy as np
import pytest

from quire.core.prefix import BlockHashes, Bundle, PrefixIndex

SIZE = 4


def hashes(tokens: list[int], namespace: str = "") -> BlockHashes:
    return BlockHashes((namespace,), tokens, SIZE)


def publish(index: PrefixIndex, tokens: list[int], first_page: int) -> list[Bundle | None]:
    """All full blocks of a sequence, two pages each."""
    digests = hashes(tokens).upto(len(tokens) // SIZE)
    pages = np.arange(first_page, first_page + 2 * len(digests), dtype=np.int32).reshape(-1, 2)
    return [index.publish(digest, pair) for digest, pair in zip(digests, pages, strict=True)]


def leave(index: PrefixIndex, bundles: list[Bundle | None]) -> None:
    for bundle in reversed(bundles):
        assert bundle is not None and index.release(bundle)


def found(index: PrefixIndex, tokens: list[int]) -> list[int]:
    """First page of each matching block."""
    blocks = index.match(hashes(tokens), len(tokens) // SIZE)
    return [int(bundle.pages[0]) for bundle in blocks if bundle.pages is not None]


def test_digests_do_not_depend_on_when_they_are_asked_for():
    tokens = list(range(200))
    growing: list[int] = []
    early = hashes(growing)
    for token in tokens:
        growing.append(token)
        early.upto(len(growing) // SIZE)
    assert early.upto(0) == hashes(tokens).upto(50)
    assert len(early.upto(0)) == 50


def test_a_digest_stands_for_everything_before_it_and_the_namespace():
    tokens = list(range(12))
    plain = hashes(tokens).upto(3)
    changed = hashes([99, *tokens[1:]]).upto(3)
    assert not set(plain) & set(changed)
    assert not set(plain) & set(hashes(tokens, "salt").upto(3))
    assert hashes([*tokens[:8], 99, 9, 10, 11]).upto(3)[:2] == plain[:2]
    assert len({BlockHashes(names, tokens, SIZE).upto(1)[0] for names in (("a", "b"), ("ab",), ("a", "b", None))}) == 3


def test_hashing_stops_soon_after_the_first_miss():
    index, long = PrefixIndex(2), hashes(list(range(4000)))
    assert index.match(long, 1000) == []
    assert 0 < len(long.upto(0)) < 100


def test_a_block_that_is_not_full_has_no_digest():
    with pytest.raises(AssertionError, match="not full"):
        hashes([1, 2, 3]).upto(1)


def test_the_longest_known_run_is_found():
    index = PrefixIndex(2)
    publish(index, [1] * 12, 0)
    publish(index, [1] * 4 + [2] * 8, 10)
    assert found(index, [1] * 20) == [0, 2, 4]
    assert found(index, [1] * 7) == [0]
    assert found(index, [1] * 4 + [2] * 4 + [3] * 4) == [0, 12]
    assert found(index, [3] * 4 + [1] * 12) == []
    assert len(index.match(hashes([1] * 12), 2)) == 2


def test_the_first_copy_stays():
    index = PrefixIndex(2)
    (first,) = publish(index, [1] * 4, 0)
    assert publish(index, [1] * 4, 10) == [None]
    assert first is not None and found(index, [1] * 4) == [0] and first.users == 1


def test_the_deepest_block_of_the_oldest_prefix_goes_first():
    index = PrefixIndex(2)
    old, new = publish(index, [1] * 12, 0), publish(index, [2] * 8, 10)
    leave(index, old)
    leave(index, new)
    assert index.num_idle_pages == 10
    assert index.reclaim(1).tolist() == [4, 5]
    assert index.reclaim(4).tolist() == [2, 3, 0, 1]
    assert found(index, [1] * 12) == [] and found(index, [2] * 8) == [10, 12]
    assert index.reclaim(99).tolist() == [12, 13, 10, 11]
    assert index.reclaim(1).tolist() == [] and index.num_idle_pages == 0
    index.check()


def test_use_makes_a_prefix_young_and_safe():
    index = PrefixIndex(2)
    old, new = publish(index, [1] * 8, 0), publish(index, [2] * 8, 10)
    leave(index, old)
    leave(index, new)
    hit = index.match(hashes([1] * 8), 2)
    for bundle in hit:
        index.acquire(bundle)
    index.check()
    assert index.num_idle_pages == 4
    assert index.reclaim(99).tolist() == [12, 13, 10, 11], "blocks in use are not reclaimed"
    publish(index, [3] * 4, 20)
    leave(index, [*hit])
    assert index.reclaim(2).tolist() == [2, 3]


def test_a_touched_block_counts_as_used():
    index = PrefixIndex(2)
    leave(index, publish(index, [1] * 4, 0))
    leave(index, publish(index, [2] * 4, 2))
    index.touch(hashes([1] * 4).upto(1)[0])
    index.touch(b"unknown")
    assert index.reclaim(2).tolist() == [2, 3]


def test_a_withdrawn_block_lives_until_its_last_user_leaves():
    index = PrefixIndex(2)
    (bundle,) = publish(index, [1] * 4, 0)
    assert bundle is not None
    index.acquire(bundle)
    index.withdraw(bundle)
    assert found(index, [1] * 4) == []
    (other,) = publish(index, [1] * 4, 10)
    assert other is not None and found(index, [1] * 4) == [10]
    index.withdraw(bundle)
    assert found(index, [1] * 4) == [10], "only the bundle itself is withdrawn"
    assert index.release(bundle) and not index.release(bundle), "the last user gets the pages"
    assert index.num_idle_pages == 0
    assert index.release(other) and index.num_idle_pages == 2
    index.check()


def test_a_bundle_is_not_released_twice():
    index = PrefixIndex(2)
    (bundle,) = publish(index, [1] * 4, 0)
    assert bundle is not None and index.release(bundle)
    with pytest.raises(AssertionError, match="nobody uses"):
        index.release(bundle)
