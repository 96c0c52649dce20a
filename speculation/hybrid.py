"""`HybridDrafter`: what stood there before where the newest tokens have come up before, else what a small model says.

N-grams cost next to nothing and are right for long where a text repeats itself; a model is right more often elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from ..core.plan import IntArray
from ..core.speculation import DraftMethod
from ..kernels.draft_chain_cpu import DrawRules
from .drafter import Drafter, Draw, Memory, Proposals
from .history import TokenHistory
from .ngram import NgramDrafter

SHORTEST_MATCH = 4
"""Tokens that must be the same before n-grams are believed rather than a model: then four of five next tokens are the
same too, in code and prose that quire-mini samples; after three, two of three."""


class HybridDrafter:
    """Fulfils `Drafter`, `Foresight` and `Memory`. Which of the two proposes depends on known tokens alone; the model
    lags behind meanwhile."""

    method: DraftMethod = "hybrid"

    def __init__(self, ngram: NgramDrafter, model: Drafter) -> None:
        self._ngram, self.model = ngram, model

    @property
    def num_bytes(self) -> int:
        """See `Drafter`."""
        return self._ngram.num_bytes + self.model.num_bytes

    def assign(self, slot: int) -> None:
        """See `Drafter`."""
        self._ngram.assign(slot)
        self.model.assign(slot)

    def clear(self) -> None:
        """See `Drafter`."""
        self._ngram.clear()
        self.model.clear()

    def foresee(self, history: TokenHistory, slots: IntArray) -> IntArray:
        """See `Foresight`."""
        return self._ngram.foresee(history, slots)

    def recall(self, history: TokenHistory, slots: IntArray) -> IntArray:
        """See `Memory`."""
        return self.model.recall(history, slots) if isinstance(self.model, Memory) else np.zeros(len(slots), np.int32)

    def propose(self, history: TokenHistory, slots: IntArray, most: IntArray, draw: Draw) -> Proposals:
        """See `Drafter`. The model proposes no more than `Draw.limits` tokens."""
        found = self._ngram.propose(history, slots, most, draw)
        wanted = np.minimum(most, draw.limits).astype(np.int32)
        others = np.flatnonzero((found.counts == 0) & (wanted > 0)).astype(np.int32)
        if len(others):
            drawn = self.model.propose(history, slots[others], wanted[others], _DrawAmong(draw, others))
            assert found.parents is None and drawn.parents is None, "a pair proposes chains"
            found.tokens[others, : drawn.tokens.shape[1]] = drawn.tokens
            found.counts[others] = drawn.counts
            return replace(found, caught_up=drawn.caught_up)
        return found


@dataclass(frozen=True, slots=True)
class _DrawAmong:
    """A `Draw` for those who were asked second."""

    draw: Draw
    among: IntArray
    """[M]: which of all sequences each one is."""

    @property
    def limits(self) -> IntArray:
        """See `Draw`."""
        return self.draw.limits[self.among]

    def rules(self, members: IntArray, active: Sequence[int]) -> DrawRules | None:
        """See `Draw`."""
        return self.draw.rules(self.among[members], active)

    def __call__(self, logits: Tensor, members: IntArray, depth: int) -> Tensor:
        return self.draw(logits, self.among[members], depth)
