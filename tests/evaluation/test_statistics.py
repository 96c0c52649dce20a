"""Intervals against scipy and against what they must cover."""

import numpy as np
from scipy.stats import binomtest

from quire.evaluation.statistics import bootstrap, interval, wilson


def test_wilson_is_scipys() -> None:
    for hits, trials in ((0, 5), (3, 10), (25, 25), (99, 100)):
        reference = binomtest(hits, trials).proportion_ci(method="wilson")
        np.testing.assert_allclose(wilson(hits, trials), (reference.low, reference.high), atol=1e-12)
    assert wilson(0, 0) == (0.0, 1.0)


def test_bootstrap_covers_the_mean_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = bootstrap(rng.normal(3.0, 2.0, size=40).tolist())
        covered += low <= 3.0 <= high
    assert 0.89 <= covered / 200 <= 0.99
    assert bootstrap([2.0, 2.0]) == (2.0, 2.0)


def test_hits_and_misses_get_wilson() -> None:
    assert interval([1.0, 1.0, 0.0]) == wilson(2, 3)
    assert interval([0.5, 1.0]) == bootstrap([0.5, 1.0])
