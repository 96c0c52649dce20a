"""Intervals of medians."""

import random

from benchmarks.intervals import median_interval, verdict


def test_an_interval_holds_the_median_and_narrows() -> None:
    rng = random.Random(1)
    for spread, most in ((0.0, 0.0), (0.02, 0.03)):
        low, high = median_interval([rng.gauss(1.0, spread) for _ in range(40)])
        assert low <= 1.0 + spread and high >= 1.0 - spread and high - low <= most
    assert median_interval([0.9, 1.0, 1.1]) == (0.9, 1.1)
    # Of many samples about as many intervals miss the true median as they should.
    missed = 0
    for _ in range(100):
        low, high = median_interval([rng.gauss(1.0, 0.02) for _ in range(25)])
        missed += not low <= 1.0 <= high
    assert missed <= 15
    assert [verdict(one, 0.97) for one in ((0.97, 1.0), (0.96, 0.98), (0.9, 0.96))] == ["above", "across", "below"]
