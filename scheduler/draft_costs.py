"""`DraftCosts`: what steps with drafts take and what steps without, measured at start and refreshed by use."""

from ..core.speculation import DraftInfo
from .cost_curve import CostCurve

_ASKING_RATE, _MOST_ASKING, _FEW_MORE = 0.1, 0.5, 1.25
"""What asking for drafts costs: how fast it is learned, its most as a share of a step, and the most rows, as a multiple
of those without drafts, of steps that teach it."""


class DraftCosts:
    """In seconds. Refined by `learn_*`, step by step."""

    def __init__(self, info: DraftInfo, num_slots: int) -> None:
        self.rows = CostCurve(info.costs.rows, num_slots * (1 + info.most))
        """Of a step by its rows, without proposing and asking."""
        self.passes = CostCurve(() if info.method == "ngram" else info.costs.drafts, num_slots)
        """Of one more draft token by a model, for so many sequences together."""
        self.asking = 0.0
        """Share of a step's time by which it takes longer if all its sequences are asked for drafts, even if none has
        any: such a step is planned, computed and taken in another way."""

    def learn_plain(self, rows: int, seconds: float) -> None:
        """A step without drafts."""
        self.rows.learn(rows, seconds)

    def learn_asked(self, asked: int, decoding: int, rows: int, seconds: float) -> None:
        """A step of so many rows that asked so many of its `decoding` sequences: where further rows are few it teaches
        what asking takes, else, or if that seems to be less than nothing, what rows do."""
        plain, share = self.rows.one(decoding), asked / decoding
        known = self.asking * share * plain
        change = (seconds - self.rows.one(rows)) - known
        if rows > _FEW_MORE * decoding or plain <= 0.0 or self.asking <= 0.0 > change:
            self.rows.learn(rows, max(seconds - known, 0.0))
            return
        change = min(max(change / plain, -_MOST_ASKING), _MOST_ASKING)
        self.asking = min(max(self.asking + _ASKING_RATE * share * change, 0.0), _MOST_ASKING)

    def learn_passes(self, sequences: int, depth: int, seconds: float, behind: bool) -> None:
        """So many sequences drew so many tokens; behind: their drafter may have had to catch up as well."""
        # One that had to took no less than it would have.
        if sequences and (not behind or seconds / depth < self.passes.one(sequences)):
            self.passes.learn(sequences, seconds / depth)
