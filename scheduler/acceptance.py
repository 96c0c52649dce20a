"""`Acceptance`: how often draft tokens are right, by their place in the draft; of each sequence, and of all.

The rate at a place is conditional: how often the token there is accepted, once those before it are.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..core.plan import IntArray

Floats = npt.NDArray[np.float64]

_PRIOR = 0.9
"""Rate at the first place while nothing is known: high, so as to find out."""
_WEIGHT = 3.0
"""Trials that this counts for, and at each further place the rate at the one before."""
_WINDOW = 400.0
"""Drafts that the rates of all remember."""
_OWN_WEIGHT = 12.0
"""Trials that the rate of all counts for in a sequence's own."""
_OWN_FORGETTING = 0.98
"""A sequence's draft weighs so much less after its next one: about the last fifty count."""
_FADING = 0.999
"""What is known of a sequence weighs so much less after each step that drafts, its own draft or not: one that was
found hopeless is tried again."""
_LEAST_TRIED = 20.0


class Acceptance:
    """Rates at the K places of a draft: of all, and of N slots, which draw on those of all."""

    def __init__(self, num_slots: int, most: int) -> None:
        self._places = np.arange(most)
        self._right: Floats = np.zeros((num_slots, most))
        """[N, K] tokens accepted, and below those tried; older ones weigh less."""
        self._tried: Floats = np.zeros((num_slots, most))
        self._all_right: Floats = np.zeros(most)
        self._all_tried: Floats = np.zeros(most)
        self.rates: Floats = np.full(most, _PRIOR)
        """[K] of all sequences."""

    def enter(self, slots: IntArray) -> None:
        """Others have these slots now."""
        self._right[slots] = self._tried[slots] = 0.0

    def chances(self, slots: IntArray) -> Floats:
        """[S, K]: how likely the tokens up to each place are all accepted; falls along K."""
        own = (self._right[slots] + _OWN_WEIGHT * self.rates) / (self._tried[slots] + _OWN_WEIGHT)
        return np.asarray(np.cumprod(own, axis=1), np.float64)

    def learn(self, slots: IntArray, asked: IntArray, accepted: IntArray) -> None:
        """Of the drafts of `slots` [S], each `asked` for so many tokens, the first `accepted` were right.

        Tokens that were asked for but not proposed count as wrong: nothing came of asking.
        """
        right = self._places < accepted[:, None]
        tried = self._places < np.minimum(asked, accepted + 1)[:, None]
        self._right *= _FADING
        self._tried *= _FADING
        self._right[slots] = _OWN_FORGETTING * self._right[slots] + right
        self._tried[slots] = _OWN_FORGETTING * self._tried[slots] + tried
        keep = max(1.0 - len(slots) / _WINDOW, 0.5)
        self._all_right = keep * self._all_right + right.sum(axis=0)
        self._all_tried = keep * self._all_tried + tried.sum(axis=0)
        self.rates = _smoothed(self._all_right.tolist(), self._all_tried.tolist())

    def fade(self, slots: IntArray, share: float) -> None:
        """Let the past weigh `share` of what it did, for a trial of `slots` to count, but for a few trials."""
        for right, tried in ((self._all_right, self._all_tried), (self._right, self._tried)):
            rows = slots if right.ndim == 2 else slice(None)
            scale = np.minimum(np.maximum(share, _LEAST_TRIED / np.maximum(tried[rows], 1e-9)), 1.0)
            right[rows] *= scale
            tried[rows] *= scale


def _smoothed(right: Sequence[float], tried: Sequence[float]) -> Floats:
    rates, rate = [], _PRIOR
    for successes, trials in zip(right, tried, strict=True):
        rate = (successes + _WEIGHT * rate) / (trials + _WEIGHT)
        rates.append(rate)
    return np.array(rates)
