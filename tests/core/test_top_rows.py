"""Rows of what a model says come back as they were, up to rounding."""

import numpy as np
import pytest

from quire.core.top_rows import LEAST_MASS, kept_tokens, pack_rows, row_bytes, unpack_rows


def test_rows_come_back() -> None:
    ids = np.array([[70_000, 3, 5], [1, 2, 4]], np.int64)
    masses = np.array([[0.5, 0.25, 0.125], [0.9, 0.06, 0.03]])
    rows = pack_rows(ids, np.log(masses).astype(np.float32))
    assert [len(row) for row in rows] == [row_bytes(3)] * 2 == [6 * 3 + 2] * 2 and kept_tokens(rows[0]) == 3
    same, logs = unpack_rows(b"".join(rows), 3)
    assert np.array_equal(same, ids)
    whole = np.concatenate([masses, 1 - masses.sum(1, keepdims=True)], 1)
    assert np.exp(logs.astype(np.float64)) == pytest.approx(whole, rel=2e-3)


def test_what_the_best_leave_is_never_nothing() -> None:
    (row,) = pack_rows(np.array([[8]], np.int64), np.zeros((1, 1), np.float32))
    assert np.exp(float(unpack_rows(row, 1)[1][0, 1])) == pytest.approx(LEAST_MASS, rel=0.02)


def test_other_lengths_are_no_rows() -> None:
    with pytest.raises(ValueError):
        unpack_rows(b"x" * 21, 3)
