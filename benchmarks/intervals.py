"""How sure a median of measurements is."""

from collections.abc import Sequence
from typing import Literal

import numpy as np


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """In which the values' true median lies with a probability of 95 %, by bootstrap; drawn the same way each time."""
    resamples = np.random.default_rng(0).choice(values, (4000, len(values)))
    low, high = np.quantile(np.median(resamples, axis=1), (0.025, 0.975))
    return float(low), float(high)


def verdict(interval: tuple[float, float], floor: float) -> Literal["above", "below", "across"]:
    """How the interval lies to the floor."""
    low, high = interval
    return "above" if low >= floor else "below" if high < floor else "across"
