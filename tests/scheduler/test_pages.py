"""The page pool lends each page once and notices when it does not come back properly."""

import numpy as np
import pytest

from quire.scheduler.pages import PagePool


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_take_and_give_keep_count():
    pool = PagePool(10)
    first, second = pool.take(4), pool.take(6)
    assert first.dtype == np.int32
    assert sorted([*first, *second]) == list(range(10))
    assert (pool.free, pool.used) == (0, 10)
    pool.give(second)
    pool.check()
    pool.check_owned(first)
    assert set(pool.take(6)) == set(second)


def test_taken_ids_do_not_change_when_others_are_given():
    pool = PagePool(6)
    first = pool.take(3)
    before = first.copy()
    pool.give(pool.take(3)[::-1])
    assert np.array_equal(first, before)


def test_nothing_is_taken_and_given():
    pool = PagePool(2)
    pool.give(pool.take(0))
    pool.check()
    assert pool.free == 2


def test_more_than_free_is_refused():
    pool = PagePool(3)
    with pytest.raises(AssertionError, match="4 pages wanted, 3 free"):
        pool.take(4)


@pytest.mark.parametrize("wrong", [ids(0), ids(3), ids(-1)], ids=["free page", "beyond", "negative"])
def test_pages_that_are_not_lent_cannot_come_back(wrong):
    pool = PagePool(3)
    pool.give(pool.take(3))
    with pytest.raises(AssertionError, match="came back"):
        pool.give(wrong)


def test_double_free_is_noticed():
    pool = PagePool(3)
    taken = pool.take(2)
    pool.give(taken[:1])
    with pytest.raises(AssertionError, match="free already"):
        pool.give(taken)


def test_check_sees_a_page_given_twice_at_once():
    pool = PagePool(3)
    page = pool.take(2)[0]
    pool.give(ids(page, page))
    with pytest.raises(AssertionError, match="free twice"):
        pool.check()


def test_check_owned_sees_a_page_in_two_tables_and_a_lost_one():
    pool = PagePool(3)
    taken = pool.take(2)
    for wrong in (ids(taken[0], taken[0]), taken[:1], np.arange(3, dtype=np.int32)):
        with pytest.raises(AssertionError, match="disagree"):
            pool.check_owned(wrong)
