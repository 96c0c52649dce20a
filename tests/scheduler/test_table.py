"""A page table grows and shrinks head by head."""

import numpy as np

from quire.scheduler.table import NO_WINDOW, PageTable


def grow(table: PageTable, count: int, first_id: int) -> tuple[list[int], list[int]]:
    """Give the table what it lacks for `count` more entries, ids from `first_id` on; returns (rows, columns)."""
    lacking = table.lacking(count)
    ids = np.arange(first_id, first_id + lacking.sum(), dtype=np.int32)
    rows, columns = table.grow(lacking, ids)
    return rows.tolist(), columns.tolist()


def test_heads_of_equal_length_grow_together():
    table = PageTable(num_rows=3, page_size=4)
    assert grow(table, 5, 10) == ([0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1])
    assert (table.room, table.num_pages) == (8, 6)
    table.append(5)
    assert table.room == 3
    assert table.kept.tolist() == [5, 5, 5]
    assert table.lacking(3).tolist() == [0, 0, 0]
    assert table.lacking(4).tolist() == [1, 1, 1]
    assert sorted(table.ids()) == list(range(10, 16))


def test_heads_of_different_length_grow_each_when_full():
    table = PageTable(num_rows=2, page_size=4)
    grow(table, 8, 0)
    table.append(8)
    table.drop_unseen(np.array([NO_WINDOW, 1], np.int32))
    grow(table, 3, 20)
    table.append(3)
    assert table.kept.tolist() == [11, 3]
    assert table.held.tolist() == [3, 1]
    assert table.lacking(2).tolist() == [1, 1]
    assert table.lacking(6).tolist() == [2, 2]
    assert grow(table, 6, 30) == ([0, 0, 1, 1], [3, 4, 1, 2])
    assert table.room == 9


def test_dropping_keeps_what_the_next_query_sees():
    table = PageTable(num_rows=3, page_size=4)
    grow(table, 18, 0)
    table.append(18)
    # The next query is at 18. Window 6 sees 13 to 18: entries 0 to 12 are unseen, 3 whole pages of them.
    groups, freed = table.drop_unseen(np.array([6, NO_WINDOW, 11], np.int32))
    assert [(rows.tolist(), pages) for rows, pages in groups] == [([2], 2), ([0], 3)]
    assert sorted(freed) == [0, 1, 2, 10, 11]
    assert table.kept.tolist() == [6, 18, 10]
    assert table.held.tolist() == [2, 5, 3]
    assert table.num_pages == 10
    assert sorted(table.ids()) == [3, 4, 5, 6, 7, 8, 9, 12, 13, 14]
    assert table.drop_unseen(np.array([6, NO_WINDOW, 11], np.int32))[0] == []


def test_an_entry_at_the_edge_of_the_window_stays():
    table = PageTable(num_rows=1, page_size=1)
    grow(table, 5, 0)
    table.append(5)
    # Entry 3 and 4 are seen from position 5 with window 3 (5 - 3 < 3).
    _, freed = table.drop_unseen(np.array([3], np.int32))
    assert freed.tolist() == [0, 1, 2]


def test_clear_forgets_everything():
    table = PageTable(num_rows=2, page_size=4)
    grow(table, 4, 7)
    table.append(2)
    assert sorted(table.clear()) == [7, 8]
    assert (table.num_pages, table.room) == (0, 0)
    assert table.kept.tolist() == table.held.tolist() == [0, 0]
    assert grow(table, 1, 3) == ([0, 1], [0, 0])
