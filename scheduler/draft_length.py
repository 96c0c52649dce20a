"""`DraftLengths`: how many tokens to draft for each sequence of a step, by what drafts have gained and steps have cost.

A step that drafts brings more tokens but takes longer. Lengths are chosen for the whole batch, so that the step gives
most tokens per second ("goodput": Liu et al. 2024, "Optimizing Speculative Decoding for Serving Large Language Models
Using Goodput"):

    sum over sequences, places  chance that all draft tokens up to there are accepted,  + 1 per sequence
    ------------------------------------------------------------------------------------------------------
    step(rows + draft tokens)  +  sum over places  draft(sequences that draft so far)  +  catching up

What is best `DraftSources` says; whether it is worth it, what is tried to find out, and when, is decided here. Whether
n-grams have something to propose for a sequence the engine foresees, so a step in which nobody has anything is one
without drafts. Letters: S sequences, K most tokens of a draft.
"""

from collections.abc import Sequence

import numpy as np

from ..core.ids import SlotId
from ..core.plan import IntArray
from ..core.speculation import DraftInfo
from .acceptance import Floats
from .draft_batch import Candidates, Lengths, Outcome
from .draft_sources import DraftSources

_ENTRY, _SLACK = 0.02, 0.005
"""What drafts must gain over none for drafting to begin; what a step's must for the step to draft, or may lose if the
last one drafted. Shares of a step."""
_LEAST_GAIN, _GAIN_RATE, _MOST_GAIN = 0.005, 1 / 32, 0.1
"""What they must gain on average, with the steps that have none, to go on; how fast that is learned; and the most that
it counts for at the beginning."""
_PROBE_TOKENS = 2
"""Of a single sequence."""
_PROBE_SHARE = 0.01
"""Of all time, what probing may cost while nothing is drafted."""
_MOST_CREDIT = 50
"""Steps' time that may be saved up for probes."""
_SHORTEST, _LONGEST = 32, 2048
"""Steps between two looks while nothing is drafted: twice as many after each probe, or return to drafting, in vain."""
_SPARING = 2
"""But after a probe no longer than it takes to save up so many like it: cheap ones are more frequent."""
_STAYED = 128
"""Steps after which a return to drafting was not in vain."""
_PATIENCE = 16
"""Steps that a look waits for n-grams to have something."""
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
_AFTERMATH = 1
"""Steps after one with drafts that are no measure of steps without."""
_FRESH = 16
"""Steps after the last one with drafts in which their costs count as known."""
_SELDOM = 64
"""Of later steps, one in so many teaches what they cost: learning takes time too."""
_LASTING = 4
"""Steps for which a choice holds, while the batch is the same and nobody has drafted for the first time; of steps
whose cost is known, one in so many teaches more."""


class DraftLengths:
    """Chooses the lengths of every step, and learns from it. N slots."""

    def __init__(self, info: DraftInfo, num_slots: int) -> None:
        self._info = info
        self.sources = DraftSources(info, num_slots)
        self.costs = self.sources.costs
        self.on = True
        """Whether drafts pay, as far as known."""
        self._gains = _MOST_GAIN
        """What they gain on average."""
        self._drafts, self._gain = True, 0.0
        """Whether the last choice was to draft, and what that was to gain."""
        self._behind = False
        """Whether drafters have much to catch up with in the step in flight."""
        self._credit = 0.0
        self._steps = self._next_look = self._changed = 0
        self._pause, self._waited = _SHORTEST, 0
        self._who = (b"", 0)
        """The batch of the last choice: whose sequences, and how many decode."""
        self._without_model = 0
        """Step up to which a model, where there are n-grams too, was found not to be worth asking for that batch."""
        self._next_choice = 0
        self._looked_at = 0
        """Sequences that decoded at the last look."""
        self._probing, self._hoped, self._estimate = False, 0.0, 0.0
        """Whether the step in flight is a probe, the chance at which it was thought to be all right, and the seconds
        that it was thought to lose."""
        self._trying = False
        """Whether in the step in flight a model drafts to find out how good it is, while n-grams are what pays."""
        self._next_plain, self._plain_pause, self._plain_turn, self._without_until = _PLAIN, _PLAIN, 0, -1
        self._last_plain = 0
        """When a step had no drafts, while others had."""
        self._unsettled: tuple[int, float] | None = None
        """Rows and seconds of the last step, if it had drafts that tell something."""
        self._last_draft = -_FRESH
        """When a step had some."""

    def idle(self, decoding: int) -> bool:
        """Whether nothing is to be drafted in a step that decodes so many sequences, as far as can be told for free."""
        if self.on or self._info.fixed or not decoding:
            return not decoding
        same = self._looked_at <= _LOAD * decoding and decoding <= _LOAD * self._looked_at
        return same and self._steps < self._next_look

    def foresees(self, decoding: int) -> bool:
        """Whether it is worth knowing what n-grams have to propose after such a step."""
        return bool(self.sources.ngrams) and (self.on or self._info.fixed or not self.idle(decoding))

    def only_foreseen(self, decoding: int) -> bool:
        """Whether a step that decodes so many sequences drafts only where n-grams were found to have something."""
        if self.sources.model is None or not self.on:
            return self.on
        return self._steps < self._without_model and decoding == self._who[1]

    def choose(self, batch: Candidates) -> Lengths:
        """Draft tokens for each of the candidates [S], within their limits; who calls sees to it that some are > 0."""
        self._probing = self._trying = False
        limits, nothing = self.sources.limits(batch), Lengths.none(len(batch.slots))
        if self._info.fixed and limits:
            return self.sources.together(limits, batch)
        if self._without_until < 0:  # what is measured at start is less than a whole step
            self._without_until = self._steps + _WITHOUT
        if not limits or (self._steps < self._without_until and self.on) or self._waits(batch, limits):
            return nothing
        who = (np.sort(batch.arrivals).tobytes(), batch.decoding)
        holds = who == self._who and self._steps < self._next_choice
        holds = holds and not (self._drafts and self._steps >= self._next_plain)
        if self.on and holds and self.sources.covers(limits):
            self._behind = False
            return self.sources.chosen(limits, batch) if self._drafts else nothing
        self.sources.enter(batch)
        self._waited = 0
        self._who, self._next_choice, self._looked_at = who, self._steps + _LASTING, batch.decoding
        lengths = self._best(batch, limits)
        self._behind = bool((self.sources.lag(batch) * (lengths.model > 0)).max() > 2)
        return lengths

    def _best(self, batch: Candidates, limits: list[IntArray]) -> Lengths:
        """Choose anew: what gains most, if that is enough; or something to find out."""
        gain = self.sources.choose(batch, limits, steady=self.on)
        lengths = self.sources.chosen(limits, batch)
        self._plain_pause = round(min(max(gain / _PROBE_SHARE, _PLAIN), _MOST_PLAIN))
        if not self.on:
            if gain <= _ENTRY:
                return self._look(batch, limits, lengths)
            self._turn(True)
            self._gains = min(gain, _MOST_GAIN)
        self._drafts, self._gain = gain > (-_SLACK if self._drafts else _SLACK), max(gain, 0.0)
        if limits[-1].any():
            wanted = self._drafts and bool(lengths.model.any())
            self._without_model = 0 if wanted else max(self._next_plain, self._steps + _PLAIN)
        if not self._drafts:
            return Lengths.none(len(batch.slots))
        return self._unlike(batch, limits, lengths) if self._steps >= self._next_plain else lengths

    def forget(self, slots: list[SlotId]) -> None:
        """The slots were assigned anew: what their drafters had seen is void, even if the same sequence comes back."""
        self._without_model = 0
        self.sources.forget(slots)

    def recall(self, slots: list[SlotId], tokens: Sequence[int]) -> None:
        """So many leading tokens of those who entered these slots the model had seen before."""
        self.sources.recall(slots, tokens)

    # --- learning ---

    def learn(
        self,
        outcome: Outcome | None,
        rows: int,
        step_seconds: float,
        draft_seconds: float,
        pure: bool,
        thought_seconds: float = 0.0,
    ) -> None:
        """Take in a step: its drafts (None: it had none), its rows with theirs, and what it took in seconds.

        step_seconds: all of it but proposing, foreseeing and, where nothing was drafted, other thoughts of it, which
        took `thought_seconds`; pure: it did nothing else of weight. Of no use where the operator chose the lengths.
        """
        if self._info.fixed:
            return
        self._steps += 1
        fresh = self.on or self._steps - self._changed <= _FRESH
        seldom = self._steps % (_LASTING if fresh else _SELDOM) == 0
        costs = self.costs.plain if outcome is None else self.costs.rows
        telling = pure and (seldom or not costs.is_known(rows))
        self._settle(rows, step_seconds if pure and outcome is None else 0.0)
        self._weigh(outcome is not None, step_seconds + draft_seconds, thought_seconds)
        if outcome is None:
            self._last_plain, since = self._steps, self._steps - self._last_draft
            if pure and (since == _AFTERMATH + 1 or (telling and since > _AFTERMATH)):
                self.costs.learn_plain(rows, step_seconds, since <= _FRESH)
        else:
            self._last_draft = self._steps
            self._learn_drafts(outcome, rows, step_seconds, draft_seconds, telling)

    def _learn_drafts(
        self, outcome: Outcome, rows: int, step_seconds: float, draft_seconds: float, telling: bool
    ) -> None:
        """What came of the drafts; telling: and what the step took, as `learn` has it."""
        turns = self.sources.turns(outcome)
        if telling:
            # Without a pass, proposing is part of what such a step takes.
            self._unsettled = rows, step_seconds if turns.any() else step_seconds + draft_seconds
            drew = outcome.model_drafted > 0
            depth = int(outcome.asked_model[drew].max(initial=1))
            self.costs.learn_passes(int(drew.sum()), depth, draft_seconds, self._behind)
        if self._probing:
            gained = self.costs.plain.one(rows - int(outcome.drafted.sum()))
            gained *= 1 + float(outcome.accepted.sum()) / self._looked_at
            self._pay(step_seconds + draft_seconds - gained - self._estimate)
            self._probed(outcome)
        elif self._trying and turns.any():
            self._tried_model(outcome)
        if self.sources.learn(outcome):
            self._next_choice = 0

    def _settle(self, rows: int, plain_seconds: float) -> None:
        """Learn from the last step with drafts, now that the next one is known; plain_seconds: of one without, if that
        is what it was. What such a one takes longer than others, drafting cost: it may be put together anew."""
        if self._unsettled is not None:
            drafted, seconds = self._unsettled
            self._unsettled = None
            longer = plain_seconds - self.costs.plain.one(rows) if plain_seconds > 0.0 else 0.0
            self.costs.learn_drafting(drafted, seconds + longer)

    def rests(self, seconds: float) -> bool:
        """Take in a step of which nobody asked anything, if that can be done for free; else it is to be learned."""
        if self.on or self._steps - self._changed < _FRESH or (self._steps + 1) % _SELDOM == 0:
            return False
        self._steps += 1
        self._save(seconds)
        return True

    def _save(self, seconds: float) -> None:
        self._credit = min(self._credit + _PROBE_SHARE * seconds, max(self._credit, _MOST_CREDIT * seconds))

    def _weigh(self, drafted: bool, seconds: float, thought: float) -> None:
        """Whether to go on drafting, after a step."""
        if not self.on:
            self._save(seconds)
        else:
            gain = (self._gain if drafted else 0.0) - thought / max(seconds, 1e-9)
            self._gains += _GAIN_RATE * (gain - self._gains)
            if self._gains < _LEAST_GAIN:
                self._turn(False)

    def _turn(self, on: bool) -> None:
        if not on:
            stayed = self._steps - self._changed >= _STAYED
            self._pause = _SHORTEST if stayed else min(2 * self._pause, _LONGEST)
            self._next_look = self._steps + self._pause
        self.on, self._changed, self._waited = on, self._steps, 0
        self._next_plain = self._steps + self._plain_pause

    # --- choosing ---

    def _waits(self, batch: Candidates, limits: list[IntArray]) -> bool:
        """Whether there is nothing to choose from, or a look should wait for it."""
        if any(limit.any() for limit in (limits if self.on else limits[: len(self.sources.ngrams)] or limits)):
            return False
        if self.on:
            return True
        self._waited += 1
        if self._waited < _PATIENCE:
            return True
        self._waited = 0
        if any(limit.any() for limit in limits):
            return False
        self._looked_at, self._next_look = batch.decoding, self._steps + self._pause
        self._pause = min(2 * self._pause, _LONGEST)
        return True

    # --- finding out ---

    def _unlike(self, batch: Candidates, limits: list[IntArray], lengths: Lengths) -> Lengths:
        """Something else than the best, to know what that costs: no drafts; shorter ones; or, where n-grams draft
        alone, a model's for some."""
        self._next_plain = self._steps + self._plain_pause
        alone = len(limits) > 1 and self.sources.model is not None and not lengths.model.any()
        alone = alone and self.sources.may_pay(batch, [*(0 * limit for limit in limits[:-1]), limits[-1]], 0.0)
        self._plain_turn = (self._plain_turn + 1) % (3 if alone else 2)
        if self._plain_turn == 0 and self._steps - self._last_plain <= self._plain_pause:
            self._plain_turn = 1
        if self._plain_turn == 0:
            self._without_until = self._steps + _WITHOUT
            return Lengths.none(len(batch.slots))
        if self._plain_turn == 1:
            return lengths.within(np.maximum(lengths.most - 1, 0), batch.budget)
        self._trying, trial = True, self._trial(batch, limits)
        return Lengths(np.maximum(lengths.most, trial), trial).within(batch.limits, batch.budget)

    def _trial(self, batch: Candidates, limits: list[IntArray]) -> IntArray:
        """[S]: short drafts by the model, of as many sequences as it can catch up with for little of the time since it
        was tried last, those first where that takes least."""
        whole = self.sources.catching_up(batch, limits)
        allowed = 3 * self._plain_pause * _PROBE_SHARE * self.costs.plain.one(batch.decoding)
        order = whole.argsort(kind="stable")
        order = order[whole[order].cumsum() <= allowed]
        lengths = np.zeros(len(batch.slots), np.int32)
        lengths[order] = np.minimum(limits[-1][order], _PROBE_TOKENS)
        return lengths

    def _tried_model(self, outcome: Outcome) -> None:
        """A model's drafts, where n-grams are what pays: if they were all right against hope, there are more soon."""
        model, drew = self.sources.model, outcome.model_drafted > 0
        if model is not None and drew.any():
            slots, drafted = outcome.slots[drew], outcome.model_drafted[drew]
            hoped = model.acceptance.chances(slots)[np.arange(len(slots)), drafted - 1].mean()
            model.acceptance.fade(slots, _FADED)
            if hoped < _LIKELY <= (outcome.accepted[drew] == drafted).mean():
                self._next_plain, self._plain_turn = self._steps, 1

    def _single(self, batch: Candidates, limits: list[IntArray], catching_up: Floats) -> Lengths:
        """A short draft of the sequence where catching up takes least, and of these the one that promises most."""
        room = np.sum(limits, axis=0)
        promise = self.sources.promise(batch.slots, limits)
        single = int(np.lexsort((-promise, np.where(room > 0, catching_up, np.inf)))[0])
        only = np.arange(len(room)) == single
        parts = [np.minimum(limit, min(_PROBE_TOKENS, batch.budget)) * only for limit in limits]
        return self.sources.together(parts, batch)

    def _look(self, batch: Candidates, limits: list[IntArray], lengths: Lengths) -> Lengths:
        """No drafts are worth it, as far as known, not even the best, `lengths`. Perhaps try these all the same, or a
        short one of the sequence where that is cheapest: as far as probes may cost."""
        self.costs.relax(batch.decoding, _RELAXED)
        hopeless = not self.sources.may_pay(batch, limits, _ENTRY)
        self._next_look = self._steps + (_LONGEST if hopeless else self._pause)
        if hopeless:
            return Lengths.none(len(batch.slots))
        whole = self.sources.catching_up(batch, limits)
        loss = self.sources.loss + float(whole @ (lengths.model > 0))
        if loss > self._credit or not lengths.most.any():
            lengths = self._single(batch, limits, whole)
            count = int(lengths.most.max())
            more = self.costs.rows.one(batch.rows + count) - self.costs.rows.one(batch.rows)
            # A pass that takes longer than a step is more likely to have been measured badly.
            passes = min(self.costs.passes.one(1), self.costs.plain.one(1))
            loss = int(lengths.model.max()) * passes + more + float(whole[lengths.most > 0].sum())
        if loss > self._credit:
            return Lengths.none(len(batch.slots))
        self._pay(loss)
        self._estimate = loss
        worth = round(_SPARING * loss / (_PROBE_SHARE * self.costs.plain.one(batch.decoding)))
        self._pause, self._probing = min(2 * self._pause, max(worth, 2 * _SHORTEST), _LONGEST), True
        self._hoped = self.sources.chance_all_right(batch.slots, lengths)
        return lengths

    def _pay(self, seconds: float) -> None:
        self._credit = max(self._credit - seconds, -_MOST_CREDIT * self.costs.plain.one(self._looked_at))

    def _probed(self, outcome: Outcome) -> None:
        """A draft that was all right, where few would have been, calls for another one soon."""
        self.sources.fade(outcome.slots, _FADED)
        if self._hoped < _LIKELY and (outcome.accepted == outcome.asked - outcome.branched).all():
            self._pause, self._next_look = _SHORTEST, self._steps
