"""`DraftSource`: where drafts come from, n-grams or a model; how often it is right, what it takes, what to ask it for.

Letters: S sequences, K most tokens of a draft, H thresholds, O = 1 + H * K offers.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..core.plan import IntArray
from .acceptance import Acceptance, Floats
from .cost_curve import CostCurve

_THRESHOLDS = np.array([0.0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8])
_PROPOSED_RATE = 0.02
_MANY, _SURPRISE = 8, 5.0
"""Of so many drafts together so many standard deviations are a surprise: then others are drafted for than before, and
what was learned of those counts for little."""


@dataclass(frozen=True, slots=True)
class Offers:
    """What a source may be asked for in a step, what that brings, and what it takes.

    The first offer is nothing. The others are sets of the most likely tokens: those with a chance above a threshold, up
    to a depth. Among them are all uniform lengths.
    """

    chances: Floats
    """[S, K]: that the tokens up to each place are all accepted."""
    limits: IntArray
    """[S]: most tokens."""
    tokens: Floats
    """[O]: expected to be accepted."""
    rows: Floats
    """[O]: expected to be verified."""
    seconds: Floats
    """[O]: for proposing."""
    drafts: Floats
    """[O]: most tokens, what is asked for."""

    def reach(self, offer: int) -> IntArray:
        """[S]: draft tokens to ask for, if there were no limits."""
        if not offer:
            return np.zeros(len(self.chances), np.int32)
        height, depth = divmod(offer - 1, self.chances.shape[1])
        return np.asarray((self.chances[:, : depth + 1] > _THRESHOLDS[height]).sum(axis=1), np.int32)


class DraftSource:
    """What is known of it. N slots."""

    def __init__(self, num_slots: int, most: int, passes: CostCurve | None) -> None:
        """passes: seconds of one more token for so many sequences together; None: it takes no time."""
        self._places, self._passes = np.arange(most), passes
        self.acceptance = Acceptance(num_slots, most)
        self._proposed: Floats = np.ones(most)
        """[K]: by place, share of the tokens asked for that are proposed, if any are."""

    def offers(self, slots: IntArray, limits: IntArray, extra: Floats | None = None) -> Offers:
        """To sequences [S] that may have `limits` tokens each; extra [S]: seconds of the first token besides."""
        chances = self.acceptance.chances(slots)
        allowed = chances * (self._places < limits[:, None])
        above = allowed > _THRESHOLDS[:, None, None]  # [H, S, K]
        counts, gains = above.sum(axis=1), np.einsum("hsk,sk->hk", above, allowed)  # [H, K]
        seconds = np.zeros(counts.shape) if self._passes is None else np.cumsum(self._passes.at(counts), axis=1)
        if extra is not None:
            seconds += (above[:, :, 0] @ extra)[:, None]
        rows, drafts = np.cumsum(self._proposed * counts, axis=1), np.cumsum(counts, axis=1)
        columns = map(_after_none, (np.cumsum(gains, axis=1), rows, seconds, drafts))
        return Offers(chances, limits, *columns)

    def learn(
        self, slots: IntArray, asked: IntArray, drafted: IntArray, accepted: IntArray, turns: npt.NDArray[np.bool_]
    ) -> None:
        """Of the slots [S], asked for so many tokens, these were proposed and those accepted; where it was the source's
        turn [S]."""
        if turns.any():
            slots, asked, drafted, accepted = (column[turns] for column in (slots, asked, drafted, accepted))
            wanted, there = ((self._places < column[:, None]).sum(axis=0) for column in (asked, drafted))
            if len(slots) >= _MANY and self._surprising(slots, asked, accepted):
                self.acceptance.fade(slots, 0.0)
            self._proposed += _PROPOSED_RATE * np.where(wanted > 0, there / np.maximum(wanted, 1) - self._proposed, 0.0)
            self.acceptance.learn(slots, asked, accepted)

    def _surprising(self, slots: IntArray, asked: IntArray, accepted: IntArray) -> bool:
        """Whether so many or so few were accepted in all as hardly ever if nothing had changed."""
        chances = self.acceptance.chances(slots) * (self._places < asked[:, None])
        expected = chances.sum(axis=1)
        variance = (chances @ (2.0 * self._places + 1.0) - expected**2).sum()
        return bool(abs(float(accepted.sum() - expected.sum())) > _SURPRISE * np.sqrt(max(variance, 0.0)) + 1.0)


def _after_none(values: npt.NDArray[np.generic]) -> Floats:
    """[H, K] as offers [O]; the first is 0."""
    return np.concatenate([[0.0], values.ravel()])
