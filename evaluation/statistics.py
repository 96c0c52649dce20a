"""Intervals: how far a score from few trials may be from the truth."""

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959963984540054
"""Two-sided 95 % of the normal distribution."""
RESAMPLES = 2000


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): right near 0 and 1 too, where the normal interval is empty."""
    if not trials:
        return 0.0, 1.0
    share, square = successes / trials, Z95**2
    centre = (share + square / (2 * trials)) / (1 + square / trials)
    spread = math.sqrt(share * (1 - share) / trials + square / (4 * trials**2)) * Z95 / (1 + square / trials)
    return max(0.0, centre - spread), min(1.0, centre + spread)


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean over trials whose scores are no mere hits (Efron 1979)."""
    if not values:
        return math.nan, math.nan
    array = np.array(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.percentile(array[picks].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Wilson where every score is a hit or a miss, else bootstrap."""
    if all(value in (0.0, 1.0) for value in values):
        return wilson(round(sum(values)), len(values))
    return bootstrap(values)
