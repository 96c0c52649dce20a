"""The known tokens of slots, as runs of unequal lengths come to them."""

import numpy as np
import pytest

from quire.speculation.history import TokenHistory


@pytest.mark.parametrize("length", [9, 40])
def test_of_padded_runs_only_the_tokens_count(length: int) -> None:
    """In the middle, and where the padding would lie behind the last place."""
    history = TokenHistory(4, length)
    for slot, known in ((0, 3), (2, 7), (3, 1)):
        history.extend(slot, tuple(range(known)))
    runs = np.array([[11, 12, 13], [21, -1, -1], [-1, -1, -1]], np.int32)
    history.append(np.array([3, 2, 0], np.int32), runs, np.array([3, 1, 0], np.int32))
    assert history.of(3).tolist() == [0, 11, 12, 13]
    assert history.of(2).tolist() == [*range(7), 21]
    assert history.of(0).tolist() == [0, 1, 2] and not history.known[1]
