"""`DraftSources`: who may propose for the sequences of a step, what each is to be asked for, and how good they are.

Sources are n-grams that rest on short matches, on long ones, and a model. Each has a length of its own, found in turns,
each given the others. Letters: S sequences, K most tokens of a draft.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..core.ids import SlotId
from ..core.plan import IntArray
from ..core.speculation import MAX_DRAFT_TOKENS, DraftInfo
from .acceptance import Floats
from .draft_batch import Candidates, Lengths, Outcome
from .draft_costs import DraftCosts
from .draft_source import DraftSource, Offers
from .goodput import Goodput

Mask = npt.NDArray[np.bool_]

_LONG_MATCH = 6
"""Tokens of a match beyond which n-grams are a source of their own: they are right more often."""
_KEPT = 0.98
"""A choice stays until it is worth so much of another."""
_HORIZON = 256
"""Tokens over which a sequence's first drafts pay for catching up."""
_CAUTION = 16
"""Draft tokens for all sequences together that have not drafted yet, or one token for each sequence of the step: after
a change of what is asked, what was learned from others may be wrong."""
_FAR_BEHIND = 2 * MAX_DRAFT_TOKENS
"""Tokens that a model has not seen of a sequence that it did not draft for in the last step."""
_CEILING = 0.9
"""A rate of acceptance to hope for."""


class DraftSources:
    """All that can propose; what was chosen last of each. N slots."""

    def __init__(self, info: DraftInfo, num_slots: int) -> None:
        self.costs = DraftCosts(info, num_slots)
        kinds = 2 if info.method in ("ngram", "hybrid") else 0
        self.ngrams = [DraftSource(num_slots, info.most, None) for _ in range(kinds)]
        """By short matches and by long ones. They propose whenever they can."""
        self.model = None if info.method == "ngram" else DraftSource(num_slots, info.most, self.costs.passes)
        self._sources = [*self.ngrams, *([] if self.model is None else [self.model])]
        self._has_cache = info.method in ("model", "hybrid")
        """Whether the model has a cache of its own to fill."""
        self._most = info.most
        self._arrivals = np.full(num_slots, -1, np.int64)
        self._drafted_to: IntArray = np.zeros(num_slots, np.int32)
        """[N]: known tokens when the sequence's model drafted last; those since then it has yet to see."""
        self._recalled: IntArray = np.zeros(num_slots, np.int32)
        """[N]: leading tokens that it had seen when the sequence entered, of others."""
        self._tried = np.zeros(num_slots, np.bool_)
        """[N]: whether the sequence has drafted."""
        self._matched: IntArray = np.zeros(num_slots, np.int32)
        """[N]: what was foreseen at the last choice."""
        self._choice = [0 for _ in self._sources]
        """Offer of each source."""
        self._reaches: dict[int, IntArray] = {}
        """[N] by source: lengths of the last choice, whatever is foreseen."""
        self.loss = 0.0
        """Seconds that the last choice would lose against no drafts."""

    # --- choosing ---

    def limits(self, batch: Candidates) -> list[IntArray]:
        """[S] by source: most tokens, 0 where it is not its turn; none at all where that is not known."""
        if not self.ngrams:
            return [batch.limits]
        if batch.foreseen is None:
            return []
        self._matched[batch.slots] = batch.foreseen
        found, long = np.minimum(batch.limits, batch.foreseen), batch.foreseen >= _LONG_MATCH
        limits = [found * ~long, found * long]
        return limits if self.model is None else [*limits, batch.limits * (batch.foreseen == 0)]

    def together(self, lengths: list[IntArray], batch: Candidates) -> Lengths:
        """Lengths [S] by source, each of other sequences, as far as the step has room."""
        most: IntArray = np.asarray(np.sum(lengths, axis=0), np.int32)
        model = np.zeros_like(most) if self.model is None else lengths[-1].astype(np.int32)
        return Lengths(most, model).within(batch.limits, batch.budget)

    def covers(self, limits: list[IntArray]) -> bool:
        """Whether the last choice, if it was for the same sequences, says enough for these limits."""
        return all(number in self._reaches or not limit.any() for number, limit in enumerate(limits))

    def chosen(self, limits: list[IntArray], batch: Candidates) -> Lengths:
        """The lengths of the last choice, within limits."""
        lengths = [
            np.minimum(self._reaches[number][batch.slots], limit) if number in self._reaches else 0 * limit
            for number, limit in enumerate(limits)
        ]
        return self.together(lengths, batch)

    def enter(self, batch: Candidates) -> None:
        """Forget who had the slots before."""
        fresh = batch.slots[self._arrivals[batch.slots] != batch.arrivals]
        if len(fresh):
            self._arrivals[batch.slots] = batch.arrivals
            self._drafted_to[fresh] = self._recalled[fresh]
            self._tried[fresh] = False
            for source in self._sources:
                source.acceptance.enter(fresh)

    def forget(self, slots: list[SlotId]) -> None:
        """The slots were assigned anew."""
        self._arrivals[slots], self._recalled[slots] = -1, 0

    def recall(self, slots: list[SlotId], tokens: Sequence[int]) -> None:
        """The model has seen so many leading tokens of those who entered these slots."""
        self._recalled[slots] = tokens

    def choose(self, batch: Candidates, limits: list[IntArray], steady: bool) -> float:
        """Choose what gives most tokens per second among all that drafts; returns the share that it gains over none.

        steady: stay with the last choice if it is not much worse.
        """
        plain = self.costs.plain.one(batch.decoding)
        caps = self._caps(batch, limits, plain / batch.decoding)
        offers = self._offers(batch, limits, caps)
        step = Goodput([*offers.values()], self.costs.rows, plain, batch.decoding, batch.rows, batch.budget)
        before = [self._choice[number] for number in offers]
        choice, goodput = step.best(before)
        if steady and choice != before:
            kept = float(step.of(before)[before[0]])
            if kept >= _KEPT * goodput:
                choice, goodput = before, kept
        self._reaches = {}
        for (number, part), offer in zip(offers.items(), choice, strict=True):
            self._choice[number] = offer
            self._reaches[number] = np.zeros(len(self._tried), np.int32)
            self._reaches[number][batch.slots] = np.minimum(part.reach(offer), caps[number])
        self.loss = max(step.tokens(choice) * (1.0 / goodput - 1.0 / step.without), 0.0) if goodput else 0.0
        return goodput / step.without - 1.0

    def _caps(self, batch: Candidates, limits: list[IntArray], token_seconds: float) -> list[IntArray]:
        """[S] by source: most tokens where caution asks for fewer than the limits; and none of a model that would take
        longer to catch up, for each token, than a token takes without drafts, `token_seconds`."""
        new = ~self._tried[batch.slots]
        most = max(max(_CAUTION, batch.decoding) // max(int(np.count_nonzero(new)), 1), 1)
        cap = np.where(new, most, self._most).astype(np.int32)
        caps = [cap for _ in limits]
        if self._has_cache:
            caps[-1] = cap * (self._spread(batch) <= token_seconds)
        return caps

    def _offers(self, batch: Candidates, limits: list[IntArray], caps: list[IntArray]) -> dict[int, Offers]:
        """Of each source whose turn it is for somebody."""
        offers = {}
        for number, (source, limit, cap) in enumerate(zip(self._sources, limits, caps, strict=True)):
            if limit.any():
                extra = self._spread(batch) if source is self.model else None
                offers[number] = source.offers(batch.slots, np.minimum(limit, cap), extra)
        return offers

    def may_pay(self, batch: Candidates, limits: list[IntArray], gain: float) -> bool:
        """Whether drafts of one, or of all whose turn it is, would gain that share if they were as good as can be."""
        plain, depth = self.costs.plain.one(batch.decoding), np.arange(1, self._most + 1)
        for source, limit in zip(self._sources, limits, strict=True):
            some = int(np.count_nonzero(limit))
            for count in {1, some} if some else ():
                tokens = batch.decoding + count * np.cumsum(_CEILING**depth)
                seconds = self.costs.rows.at(batch.rows + count * depth) - self.costs.rows.one(batch.rows) + plain
                # A pass that takes longer than a step is more likely to have been measured badly.
                if source is self.model and self.costs.passes.one(count) < plain:
                    seconds = seconds + depth * self.costs.passes.one(count)
                if (tokens * plain > (1.0 + gain) * batch.decoding * seconds).any():
                    return True
        return False

    # --- a model that has yet to see what others brought ---

    def lag(self, batch: Candidates) -> IntArray:
        """[S]: known tokens that the model has not seen, but for those of the last step."""
        return batch.known - self._drafted_to[batch.slots]

    def catching_up(self, batch: Candidates, limits: list[IntArray]) -> Floats:
        """[S]: seconds for that, 0 where it is not the model's turn; at the target's costs of many rows, scaled as
        those of one. Only a draft model of its own has a cache to fill."""
        if not self._has_cache:
            return np.zeros(len(batch.slots))
        scale = min(self.costs.passes.one(1) / max(self.costs.plain.one(1), 1e-9), 1.0)
        return np.asarray(self.lag(batch) * (scale * self.costs.rows.slope) * (limits[-1] > 0), np.float64)

    def _spread(self, batch: Candidates) -> Floats:
        """[S]: the same over what the sequence may still say, whosever turn it is."""
        return self.catching_up(batch, [batch.limits]) / np.clip(batch.left, 1, _HORIZON)

    # --- learning ---

    def turns(self, outcome: Outcome) -> Mask:
        """[S]: for whom it was the model's turn."""
        return (outcome.asked_model > 0) & ~self._by_ngrams(outcome) & (self.model is not None)

    def _by_ngrams(self, outcome: Outcome) -> Mask:
        return (outcome.drafted > 0) & (outcome.model_drafted == 0) & bool(self.ngrams)

    def learn(self, outcome: Outcome) -> bool:
        """Each source learns from its own proposals; whether somebody had none before."""
        first = not self._tried[outcome.slots].all()
        self._tried[outcome.slots] = True
        found, long = self._by_ngrams(outcome), self._matched[outcome.slots] >= _LONG_MATCH
        places = outcome.asked - outcome.branched
        for source, turns in zip(self.ngrams, (found & ~long, found & long), strict=False):
            source.learn(outcome.slots, places, outcome.drafted, outcome.accepted, turns)
        if self.model is not None:
            places, turns = outcome.asked_model - outcome.branched, self.turns(outcome)
            # One that had much to catch up with may need a further step for that: this one says nothing yet.
            behind = self._has_cache & (outcome.known - self._drafted_to[outcome.slots] > _FAR_BEHIND)
            told = turns & ~(behind & (outcome.drafted == 0))
            self.model.learn(outcome.slots, places, outcome.drafted, outcome.accepted, told)
            self._drafted_to[outcome.slots[turns]] = outcome.known[turns]
        return first

    def promise(self, slots: IntArray, limits: list[IntArray]) -> Floats:
        """[S]: how likely the first token of each would be right, by whoever's turn it is."""
        pairs = zip(self._sources, limits, strict=True)
        chances = [source.acceptance.chances(slots)[:, 0] * (limit > 0) for source, limit in pairs]
        return np.asarray(np.sum(chances, axis=0), np.float64)

    def fade(self, slots: IntArray, share: float) -> None:
        """See `Acceptance.fade`."""
        for source in self._sources:
            source.acceptance.fade(slots, share)

    def chance_all_right(self, slots: IntArray, lengths: Lengths) -> float:
        """How likely each of the drafts is accepted to its end, on average."""
        by_model, long = lengths.model > 0, self._matched[slots] >= _LONG_MATCH
        kinds = [~by_model & ~long, ~by_model & long, by_model] if self.ngrams else [by_model]
        chances = np.zeros(len(slots))
        for source, kind in zip(self._sources, kinds, strict=False):
            rows = np.flatnonzero(kind & (lengths.most > 0))
            chances[rows] = source.acceptance.chances(slots[rows])[np.arange(len(rows)), lengths.most[rows] - 1]
        return float(chances[lengths.most > 0].mean())
