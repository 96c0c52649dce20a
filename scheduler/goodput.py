"""`Goodput`: tokens per second of a step, by what each source of drafts is asked for; and the best of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .acceptance import Floats
from .cost_curve import CostCurve
from .draft_source import Offers

_ROUNDS = 2
"""How often each of several sources is fitted to what is asked of the others."""


@dataclass(frozen=True, slots=True)
class Goodput:
    """Of a step with these offers, each to other sequences. A choice is one of each source; see `draft_length`."""

    offers: Sequence[Offers]
    costs: CostCurve
    """Seconds by rows, if somebody drafts."""
    plain: float
    """Seconds, if nobody does, but for what else the step computes."""
    decoding: int
    """Sequences that get a token."""
    rows: int
    """Of the step, without drafts."""
    budget: int
    """Draft tokens that it can take."""

    @property
    def without(self) -> float:
        """If nobody drafts."""
        return self.decoding / max(self.plain, 1e-9)

    def of(self, choice: Sequence[int], number: int = 0) -> Floats:
        """[O]: by the offer of source `number`, with those chosen of the others; 0 where that is not to be had."""
        part = self.offers[number]
        tokens, rows, seconds = part.tokens + self.decoding, part.rows + self.rows, part.seconds
        drafts = part.drafts
        for other, offer in zip(self.offers, choice, strict=True):
            if other is not part:
                tokens, rows = tokens + other.tokens[offer], rows + other.rows[offer]
                seconds, drafts = seconds + other.seconds[offer], drafts + other.drafts[offer]
        # What else the step computes takes its time either way.
        seconds = seconds + self.costs.at(rows) + (self.costs.one(self.decoding) - self.costs.one(self.rows))
        scores = tokens / np.maximum(seconds, 1e-9)
        return np.where((drafts > 0) & (drafts <= self.budget), scores, 0.0)

    def best(self, start: Sequence[int]) -> tuple[list[int], float]:
        """The choice that gives most, but for nothing from all, and what it gives; `start`: a choice to begin with."""
        choice, goodput = list(start), 0.0
        for _ in range(_ROUNDS if len(self.offers) > 1 else 1):
            for number in range(len(self.offers)):
                scores = self.of(choice, number)
                choice[number] = int(scores.argmax())
                goodput = float(scores[choice[number]])
        return choice, goodput

    def tokens(self, choice: Sequence[int]) -> float:
        """Expected tokens of the step."""
        return self.decoding + sum(float(o.tokens[c]) for o, c in zip(self.offers, choice, strict=True))
