"""`DraftLengths`: how many tokens to draft for each sequence of a step, by what drafts have gained and steps have cost.

A step that drafts brings more tokens but takes longer. Lengths are chosen for the whole batch, so that the step gives
most tokens per second ("goodput": Liu et al. 2024, "Optimizing Speculative Decoding for Serving Large Language Models
Using Goodput"):

    sum over sequences, places  chance that all draft tokens up to there are accepted,  + 1 per sequence
    ------------------------------------------------------------------------------------------------------
    step(rows + draft tokens)  +  asking  +  sum over places  draft(sequences that draft so far)  +  catching up

Candidates are the offers of a `DraftSource`, and of two where n-grams and a model draft together: then each has a
length of its own, found in turns, each given the other. How often it is whose turn to propose is learned, too. Letters:
S sequences, K most tokens of a draft.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..core.ids import SlotId
from ..core.plan import IntArray
from ..core.speculation import DraftInfo
from .acceptance import Acceptance, Floats
from .draft_costs import DraftCosts
from .draft_source import DraftSource, Offers
from .goodput import Goodput

_KEPT, _ENTRY = 0.98, 1.03
"""A choice stays until it is worth so much of another; to begin drafting must be worth so much of not drafting."""
_HORIZON = 256
"""Tokens over which a sequence's first drafts pay for catching up."""
_PROBE_TOKENS = 2
"""Of a single sequence."""
_PROBE_SHARE = 0.01
"""Of all time, what probing may cost while nothing is drafted."""
_MOST_CREDIT = 50
"""Steps' time that may be saved up for probes."""
_SHORTEST, _LONGEST = 32, 2048
"""Steps between two looks while nothing is drafted: twice as many after each probe, or return to drafting, in vain."""
_LOAD = 1.25
"""When the batch has changed by this factor, it is time to look again."""
_LIKELY = 0.5
"""A probe is news where this was not the chance of its success."""
_FADED = 0.85
"""What the past weighs after a probe."""
_RELAXED = 0.05
"""How far a look takes costs back to those measured at start."""
_PLAIN, _MOST_PLAIN = 32, 512
"""While it drafts, a step in at least and at most so many does not, or less by turns, to know what that costs: what it
loses is to be `_PROBE_SHARE` of the time, so where drafts hardly pay it is often."""
_WITHOUT = 4
"""Steps that go without in a row."""
_FRESH = 16
"""Steps after the last one with drafts in which their costs count as known."""
_SELDOM = 64
"""Of later steps alike, one in so many teaches what they cost: learning takes time too."""
_LASTING = 4
"""Steps for which a choice holds while the batch is the same; of steps alike, one in so many teaches what they cost."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Sequences of a step that may draft."""

    slots: IntArray
    """[S], distinct."""
    arrivals: npt.NDArray[np.int64]
    """[S]: whose slot it is, a number never used again."""
    known: IntArray
    """[S]: tokens."""
    left: IntArray
    """[S]: tokens that the sequence may still get."""
    limits: IntArray
    """[S]: most draft tokens, 0 to K."""
    decoding: int
    """Sequences of the step that get a token, with those that may not draft."""
    rows: int
    """Of the step, without drafts."""
    budget: int
    """Draft tokens that it can take."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Draft tokens of sequences."""

    most: IntArray
    """[S]: that may be proposed."""
    model: IntArray
    """[S]: of them, those that a model may draw where n-grams draft too; else the same."""

    @staticmethod
    def none(sequences: int) -> "Lengths":
        """Nobody drafts."""
        nothing = np.zeros(sequences, np.int32)
        return Lengths(nothing, nothing)

    def within(self, limits: IntArray, budget: int) -> "Lengths":
        """As far as `limits` [S] allow, and a budget in all, which those named first have first."""
        most = np.minimum(self.most, limits)
        before = np.cumsum(most) - most
        most = np.clip(budget - before, 0, most).astype(np.int32)
        return Lengths(most, np.minimum(self.model, most))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of the drafts of a step."""

    slots: IntArray
    """[S], distinct."""
    asked: IntArray
    """[S]: as planned, at least 1."""
    asked_model: IntArray
    """[S]: as planned, see `Lengths.model`."""
    drafted: IntArray
    """[S]: proposed and verified."""
    model_drafted: IntArray
    """[S]: of them, those that a model drew: all or none."""
    accepted: IntArray
    """[S]"""
    known: IntArray
    """[S]: tokens known now."""
    branched: IntArray | int = 0
    """[S]: those of `drafted` that tried no further place, as `SequenceOutput` has it."""


class DraftLengths:
    """Chooses the lengths of every step, and learns from it. N slots."""

    def __init__(self, info: DraftInfo, num_slots: int) -> None:
        self._info = info
        self.costs = DraftCosts(info, num_slots)
        two = info.method == "hybrid"
        self._ngrams = DraftSource(num_slots, info.most, None) if two or info.method == "ngram" else None
        """They propose whenever they can."""
        self._model = None if info.method == "ngram" else DraftSource(num_slots, info.most, self.costs.passes)
        self._sources = [source for source in (self._ngrams, self._model) if source is not None]
        self._found = Acceptance(num_slots, 1)
        """How often n-grams can."""
        self._arrivals = np.full(num_slots, -1, np.int64)
        self._drafted_to: IntArray = np.zeros(num_slots, np.int32)
        """[N]: known tokens when the sequence's model drafted last; those since then it has yet to see."""
        self.on = True
        """Whether the last choice was to draft."""
        self._choice = [0 for _ in self._sources]
        """Offer of each source."""
        self._behind = False
        """Whether drafters have much to catch up with in the step in flight."""
        self._credit = 0.0
        self._steps = self._next_look = self._changed = 0
        self._pause = _SHORTEST
        self._last_rows = 0
        self._who = (b"", b"", 0)
        """The batch of the last choice."""
        self._lengths = Lengths.none(0)
        """That choice."""
        self._next_choice = 0
        self._looked_at = 0
        """Sequences that decoded at the last look."""
        self._loss = 0.0
        """Seconds that the best drafts would lose against none, at the last look."""
        self._probing, self._hoped, self._estimate = False, 0.0, 0.0
        """Whether the step in flight is a probe, the chance at which it was thought to be all right, and the seconds
        that it was thought to lose."""
        self._trying = False
        """Whether in the step in flight a model drafts to find out how good it is, while n-grams are what pays."""
        self._next_plain, self._plain_pause, self._plain_turn, self._without_until = _PLAIN, _PLAIN, 0, 0

    def idle(self, decoding: int) -> bool:
        """Whether nothing is to be drafted in a step that decodes so many sequences, as far as can be told for free."""
        if self.on or self._info.fixed or not decoding:
            return not decoding
        same = self._looked_at <= _LOAD * decoding and decoding <= _LOAD * self._looked_at
        return same and self._steps < self._next_look

    def choose(self, batch: Candidates) -> Lengths:
        """Draft tokens for each of the candidates [S], within their limits; who calls sees to it that some are > 0."""
        if self._info.fixed:
            return Lengths(batch.limits, batch.limits).within(batch.limits, batch.budget)
        if self.on and self._steps < self._without_until:
            self._probing = self._trying = False
            return Lengths.none(len(batch.slots))
        who = (batch.slots.tobytes(), batch.arrivals.tobytes(), batch.decoding)
        if self.on and who == self._who and self._steps < min(self._next_choice, self._next_plain):
            self._behind = False
            return self._lengths.within(batch.limits, batch.budget)
        self._enter(batch)
        drafted, lengths = self.on, self._best(batch)
        self._who, self._lengths, self._next_choice = who, lengths, self._steps + _LASTING
        self._probing = self._trying = False
        if self.on != drafted:
            if drafted:
                lengths = Lengths.none(len(batch.slots))
                stayed = self._steps - self._changed >= _SHORTEST
                self._pause = _SHORTEST if stayed else min(2 * self._pause, _LONGEST)
                self._next_look = self._steps + self._pause
            self._changed = self._steps
            self._next_plain = self._steps + self._plain_pause
        elif not self.on:
            lengths = self._look(batch, lengths)
        elif self._steps >= self._next_plain:
            lengths = self._unlike(batch, lengths)
        self._behind = bool((self._lag(batch) * (lengths.model > 0)).max() > 2)
        return lengths

    def forget(self, slots: list[SlotId]) -> None:
        """The slots were assigned anew: what their drafters had seen is void, even if the same sequence comes back."""
        self._arrivals[slots] = -1

    # --- learning ---

    def learn(self, outcome: Outcome | None, rows: int, step_seconds: float, draft_seconds: float, pure: bool) -> None:
        """Take in a step: its drafts (None: it had none), its rows with theirs, and what it took in seconds.

        step_seconds: all of it but proposing; pure: it did nothing else of weight.
        """
        self._steps += 1
        if not self.on:
            seconds = step_seconds + draft_seconds
            self._credit = min(self._credit + _PROBE_SHARE * seconds, max(self._credit, _MOST_CREDIT * seconds))
        fresh = self.on or self._steps - self._changed <= _FRESH
        without = self.on and outcome is None
        telling = pure and (without or rows != self._last_rows or self._steps % (_LASTING if fresh else _SELDOM) == 0)
        self._last_rows = rows
        if outcome is None:
            if telling:
                self.costs.learn_plain(rows, step_seconds, fresh)
            return
        found, drew = self._found_by_ngrams(outcome), outcome.model_drafted > 0
        turns = ~found & (outcome.asked_model > 0) & (self._model is not None)
        decoding = rows - int(outcome.drafted.sum())
        if telling:
            # Without a pass, proposing is part of what asking takes.
            seconds = step_seconds if turns.any() else step_seconds + draft_seconds
            self.costs.learn_asked(len(outcome.slots), decoding, rows, seconds)
            depth = int(outcome.asked_model[drew].max(initial=1))
            self.costs.learn_passes(int(drew.sum()), depth, draft_seconds, self._behind)
        if self._probing:
            gained = self.costs.rows.one(decoding) * (1 + outcome.accepted.sum() / self._looked_at)
            self._pay(step_seconds + draft_seconds - float(gained) - self._estimate)
            self._probed(outcome)
        elif self._trying and turns.any():
            self._tried(outcome)
        if self._ngrams is not None:
            self._found.learn(outcome.slots, np.ones_like(outcome.asked), found.astype(np.int32))
            places = outcome.asked - outcome.branched
            self._ngrams.learn(outcome.slots, places, outcome.drafted, outcome.accepted, found)
        if self._model is not None:
            places = outcome.asked_model - outcome.branched
            self._model.learn(outcome.slots, places, outcome.drafted, outcome.accepted, turns)
            self._drafted_to[outcome.slots[turns]] = outcome.known[turns]

    def _found_by_ngrams(self, outcome: Outcome) -> npt.NDArray[np.bool_]:
        """[S]: whose proposal was theirs."""
        return (outcome.drafted > 0) & (outcome.model_drafted == 0) & (self._ngrams is not None)

    # --- choosing ---

    def _enter(self, batch: Candidates) -> None:
        fresh = batch.slots[self._arrivals[batch.slots] != batch.arrivals]
        if len(fresh):
            self._arrivals[batch.slots] = batch.arrivals
            self._drafted_to[fresh] = 0
            for acceptance in (self._found, *(source.acceptance for source in self._sources)):
                acceptance.enter(fresh)

    def _best(self, batch: Candidates) -> Lengths:
        """The lengths of most tokens per second among those that draft; sets `on`: whether not to is worse."""
        plain = self.costs.rows.one(batch.decoding) / batch.decoding
        offers = self._offers(batch, plain)
        step = Goodput(offers, self.costs.rows, batch.decoding, batch.rows, batch.budget, self.costs.asking * plain)
        choice, goodput = step.best(self._choice)
        if self.on and choice != self._choice:
            kept = float(step.of(self._choice)[self._choice[0]])
            if kept >= _KEPT * goodput:
                choice, goodput = self._choice, kept
        self._choice, self._looked_at = choice, batch.decoding
        self.on = goodput > step.without * (_KEPT if self.on else _ENTRY)
        self._plain_pause = round(min(max((goodput / step.without - 1.0) / _PROBE_SHARE, _PLAIN), _MOST_PLAIN))
        self._loss = max(step.tokens(choice) * (1.0 / goodput - 1.0 / step.without), 0.0) if goodput else 0.0
        lengths = [part.lengths(offer) for part, offer in zip(offers, choice, strict=True)]
        model = lengths[-1] if self._model is not None else np.zeros_like(lengths[-1])
        return Lengths(np.maximum(lengths[0], model), model).within(batch.limits, batch.budget)

    def _offers(self, batch: Candidates, token_seconds: float) -> list[Offers]:
        """Of each source; token_seconds: of a token without drafts, which no model may take to catch up."""
        slots, offers = batch.slots, list[Offers]()
        found = np.zeros(len(slots)) if self._ngrams is None else self._found.chances(slots)[:, 0]
        if self._ngrams is not None:
            offers.append(self._ngrams.offers(slots, batch.limits, found, np.zeros(len(slots))))
        if self._model is not None:
            catching_up = self._catching_up(batch)
            limits = np.where(catching_up > token_seconds, 0, batch.limits).astype(np.int32)
            offers.append(self._model.offers(slots, limits, 1.0 - found, catching_up))
        return offers

    def _lag(self, batch: Candidates) -> IntArray:
        """[S]: known tokens that the model has not seen, but for those of the last step."""
        return batch.known - self._drafted_to[batch.slots]

    def _catching_up(self, batch: Candidates) -> Floats:
        """[S]: seconds for that, spread over what the sequence may still say; at the target's costs of many rows,
        scaled as those of one. Only a draft model of its own has a cache to fill."""
        if self._info.method not in ("model", "hybrid"):
            return np.zeros(len(batch.slots))
        scale = min(self.costs.passes.one(1) / max(self.costs.rows.one(1), 1e-9), 1.0)
        spread = np.clip(batch.left, 1, _HORIZON)
        return np.asarray(self._lag(batch) * (scale * self.costs.rows.slope) / spread, np.float64)

    # --- finding out ---

    def _unlike(self, batch: Candidates, lengths: Lengths) -> Lengths:
        """Something else than the best, to know what that costs: no drafts; shorter ones; or, where n-grams draft
        alone, a model's for some."""
        self._next_plain = self._steps + self._plain_pause
        alone = len(self._sources) > 1 and not lengths.model.any()
        self._plain_turn = (self._plain_turn + 1) % (3 if alone else 2)
        if self._plain_turn == 0:
            self._without_until = self._steps + _WITHOUT
            return Lengths.none(len(batch.slots))
        if self._plain_turn == 1:
            return lengths.within(np.maximum(lengths.most - 1, 0), batch.budget)
        self._trying, trial = True, self._trial(batch)
        return Lengths(np.maximum(lengths.most, trial), trial).within(batch.limits, batch.budget)

    def _trial(self, batch: Candidates) -> IntArray:
        """[S]: short drafts by the model, of as many sequences as it can catch up with for little of the time since it
        was tried last, those first where that takes least."""
        whole = self._catching_up(batch) * np.clip(batch.left, 1, _HORIZON)
        allowed = 3 * self._plain_pause * _PROBE_SHARE * self.costs.rows.one(batch.decoding)
        order = whole.argsort(kind="stable")
        order = order[whole[order].cumsum() <= allowed]
        lengths = np.zeros(len(batch.slots), np.int32)
        lengths[order] = np.minimum(batch.limits[order], _PROBE_TOKENS)
        return lengths

    def _tried(self, outcome: Outcome) -> None:
        """A model's drafts, where n-grams are what pays: if they were all right against hope, there are more soon."""
        assert self._model is not None
        drew = outcome.model_drafted > 0
        if drew.any():
            slots, drafted = outcome.slots[drew], outcome.model_drafted[drew]
            hoped = self._model.acceptance.chances(slots)[np.arange(len(slots)), drafted - 1].mean()
            self._model.acceptance.fade(slots, _FADED)
            if hoped < _LIKELY <= (outcome.accepted[drew] == drafted).mean():
                self._next_plain, self._plain_turn = self._steps, 1

    def _single(self, batch: Candidates, catching_up: Floats) -> IntArray:
        """Lengths [S] of a short draft of the sequence where catching up takes least."""
        lengths = np.zeros(len(batch.slots), np.int32)
        single = int(np.where(batch.limits > 0, catching_up, np.inf).argmin())
        lengths[single] = min(int(batch.limits[single]), _PROBE_TOKENS, batch.budget)
        return lengths

    def _look(self, batch: Candidates, lengths: Lengths) -> Lengths:
        """No drafts are worth it, as far as known, not even the best, `lengths`. Perhaps try these all the same, or a
        short one of the sequence where that is cheapest: as far as probes may cost."""
        self.costs.rows.relax(batch.decoding, _RELAXED)
        self._next_look = self._steps + self._pause
        whole = self._catching_up(batch) * np.clip(batch.left, 1, _HORIZON)
        loss = self._loss + float(whole @ (lengths.model > 0))
        if loss > self._credit or not lengths.most.any():
            single = self._single(batch, whole)
            lengths, count = Lengths(single, single), int(single.max())
            more = self.costs.rows.one(batch.rows + count) - self.costs.rows.one(batch.rows)
            # A pass that takes longer than a step is more likely to have been measured badly.
            passes = min(self.costs.passes.one(1), self.costs.rows.one(1))
            loss = count * passes + more + float(whole[single > 0].sum())
        if loss > self._credit:
            return Lengths.none(len(batch.slots))
        self._pay(loss)
        self._estimate = loss
        self._pause, self._probing = min(2 * self._pause, _LONGEST), True
        self._hoped = self._chance_all_right(batch.slots, lengths)
        return lengths

    def _chance_all_right(self, slots: IntArray, lengths: Lengths) -> float:
        """How likely each of the drafts is accepted to its end, on average."""
        slots, counts = slots[lengths.most > 0], lengths.most[lengths.most > 0, None]
        chances = [np.take_along_axis(s.acceptance.chances(slots), counts - 1, axis=1)[:, 0] for s in self._sources]
        if self._ngrams is not None:
            found = self._found.chances(slots)[:, 0]
            chances = [part * turn for part, turn in zip(chances, (found, 1.0 - found), strict=False)]
        return float(np.mean(np.sum(chances, axis=0)))

    def _pay(self, seconds: float) -> None:
        self._credit = max(self._credit - seconds, -_MOST_CREDIT * self.costs.rows.one(self._looked_at))

    def _probed(self, outcome: Outcome) -> None:
        """A draft that was all right, where few would have been, calls for another one soon."""
        for source in self._sources:
            source.acceptance.fade(outcome.slots, _FADED)
        if self._hoped < _LIKELY and (outcome.accepted == outcome.asked - outcome.branched).all():
            self._pause, self._next_look = _SHORTEST, self._steps
