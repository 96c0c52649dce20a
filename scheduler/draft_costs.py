"""`DraftCosts`: what steps with drafts take and what steps without, measured at start and refreshed by use."""

from ..core.speculation import DraftInfo
from .cost_curve import FAR_BELOW, CostCurve

_FIRST, _CLIP = 8, 2.0
"""Steps with drafts that tell what all of them take besides their rows; and at most so many times what was expected."""


class DraftCosts:
    """In seconds. Refined by `learn_*`, step by step.

    Steps with drafts are planned, computed and taken in another way, which takes the host longer: so they and those
    without have curves of their own. A draft that seems to be free because both share one is the dearest mistake.
    """

    def __init__(self, info: DraftInfo, num_slots: int) -> None:
        self.plain = CostCurve(info.costs.rows, num_slots)
        """Of a step without drafts, by its rows."""
        self.rows = CostCurve(info.costs.rows, num_slots * (1 + info.most))
        """Of a step with drafts by its rows, without proposing."""
        self.passes = CostCurve(() if info.method == "ngram" else info.costs.drafts, num_slots)
        """Of one more draft token by a model, for so many sequences together."""
        self._drafted = 0

    def learn_plain(self, rows: int, seconds: float, fresh: bool) -> None:
        """A step without drafts. Unless steps with drafts were measured lately (fresh), they change alike."""
        before = self.plain.one(rows)
        self.plain.learn(rows, seconds)
        if before > 0.0 and not fresh:
            factor = self.plain.one(rows) / before
            self.rows.scale(factor)
            if factor < FAR_BELOW and not self._drafted:  # wrong at start, as is what was measured with it
                self.passes.scale(factor)

    def learn_drafting(self, rows: int, seconds: float) -> None:
        """A step with drafts. What it takes to plan and to verify it was not measured at start."""
        expected = self.rows.one(rows)
        self._drafted += 1
        if self._drafted > _FIRST or seconds <= expected:
            self.rows.learn(rows, seconds)
        else:
            self.rows.shift(min(seconds - expected, _CLIP * expected) / self._drafted)

    def relax(self, rows: int, share: float) -> None:
        """Return by `share` to what a step with drafts would take if it took no longer than others of so many rows: for
        what is long unseen."""
        self.rows.relax(rows, self.plain.one(rows), share)

    def learn_passes(self, sequences: int, depth: int, seconds: float, behind: bool) -> None:
        """So many sequences drew so many tokens; behind: their drafter may have had to catch up as well."""
        # One that had to took no less than it would have.
        if sequences and (not behind or seconds / depth < self.passes.one(sequences)):
            self.passes.learn(sequences, seconds / depth)
