"""`DraftLengths`: how many tokens to draft for each sequence of a step, by what drafts have gained and steps have cost.

A step that drafts brings more tokens but takes longer. Lengths are chosen for the whole batch, so that the step gives
most tokens per second ("goodput": Liu et al. 2024, "Optimizing Speculative Decoding for Serving Large Language Models
Using Goodput"):

    sum over sequences, places  chance that all draft tokens up to there are accepted,  + 1 per sequence
    ------------------------------------------------------------------------------------------------------
    step(rows + draft tokens)  +  asking  +  sum over places  draft(sequences that draft so far)  +  catching up

Candidates are sets of the most likely tokens: those with a chance above a threshold, up to a depth. Among them are all
uniform lengths, and none at all. Letters: S sequences, K most tokens of a draft, H thresholds.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..core.ids import SlotId
from ..core.plan import IntArray
from ..core.speculation import HYBRID_DEPTH, DraftInfo
from .acceptance import Acceptance, Floats
from .cost_curve import CostCurve

_THRESHOLDS = np.array([0.0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8])
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
"""While it drafts, a step in so many does not, or less by turns, to know what that costs; ever more seldom."""
_ASKING_RATE, _MOST_ASKING, _FEW_MORE = 0.1, 0.5, 1.25
"""What asking for drafts costs: how fast it is learned, its most as a share of a step, and the most rows, as a multiple
of those without drafts, of steps that teach it."""
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
class Outcome:
    """What came of the drafts of a step."""

    slots: IntArray
    """[S], distinct."""
    asked: IntArray
    """[S]: as planned."""
    drafted: IntArray
    """[S]: proposed and verified."""
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
        self._places = np.arange(info.most)
        self._passes = min(info.most, HYBRID_DEPTH) if info.method == "hybrid" else info.most
        """Tokens of a draft that take time to propose; further ones cost nothing."""
        self.acceptance = Acceptance(num_slots, info.most)
        self.rows = CostCurve(info.costs.rows, num_slots * (1 + info.most))
        """Seconds of a step by its rows, without proposing."""
        self.passes = CostCurve(info.costs.drafts, num_slots, steady=info.method != "hybrid")
        """Seconds of one more draft token for so many sequences together."""
        self._arrivals = np.full(num_slots, -1, np.int64)
        self._drafted_to: IntArray = np.zeros(num_slots, np.int32)
        """[N]: known tokens when the sequence drafted last; those since then its drafter has yet to see."""
        self._asking = 0.0
        """Share of a step's time by which it takes longer if all its sequences are asked for drafts, even if none has
        any: such a step is planned, computed and taken in another way."""
        self._proposed = 1.0
        """Share of the tokens asked for that are proposed."""
        self.on = True
        """Whether the last choice was to draft."""
        self._choice = (0, info.most - 1)
        """(threshold, depth - 1)"""
        self._behind = False
        """Whether drafters have much to catch up with in the step in flight."""
        self._credit = 0.0
        self._steps = self._next_look = self._changed = 0
        self._pause = _SHORTEST
        self._last_rows = 0
        self._who = (b"", b"", 0)
        """The batch of the last choice."""
        self._lengths: IntArray = np.empty(0, np.int32)
        """That choice."""
        self._next_choice = 0
        self._looked_at = 0
        """Sequences that decoded at the last look."""
        self._loss = 0.0
        """Seconds that the best drafts would lose against none, at the last look."""
        self._probing, self._hoped, self._estimate = False, 0.0, 0.0
        """Whether the step in flight is a probe, the chance at which it was thought to be all right, and the seconds
        that it was thought to lose."""
        self._next_plain, self._plain_pause, self._shorter = _PLAIN, _PLAIN, False

    def idle(self, decoding: int) -> bool:
        """Whether nothing is to be drafted in a step that decodes so many sequences, as far as can be told for free."""
        if self.on or self._info.fixed or not decoding:
            return not decoding
        same = self._looked_at <= _LOAD * decoding and decoding <= _LOAD * self._looked_at
        return same and self._steps < self._next_look

    def choose(self, batch: Candidates) -> IntArray:
        """Draft tokens for each of the candidates [S], within their limits; who calls sees to it that some are > 0."""
        if self._info.fixed:
            before = np.cumsum(batch.limits) - batch.limits
            return np.clip(batch.budget - before, 0, batch.limits).astype(np.int32)
        who = (batch.slots.tobytes(), batch.arrivals.tobytes(), batch.decoding)
        if self.on and who == self._who and self._steps < min(self._next_choice, self._next_plain):
            lengths = np.minimum(self._lengths, batch.limits)
            if int(lengths.sum()) <= batch.budget:
                self._behind = False
                return lengths
        self._enter(batch)
        drafted, lengths = self.on, self._best(batch)
        self._who, self._lengths, self._next_choice = who, lengths, self._steps + _LASTING
        self._probing = False
        if self.on != drafted:
            if drafted:
                lengths = np.zeros_like(lengths)
                stayed = self._steps - self._changed >= _SHORTEST
                self._pause = _SHORTEST if stayed else min(2 * self._pause, _LONGEST)
                self._next_look = self._steps + self._pause
            self._changed, self._plain_pause = self._steps, _PLAIN
            self._next_plain = self._steps + _PLAIN
        elif not self.on:
            lengths = self._look(batch, lengths)
        elif self._steps >= self._next_plain:
            self._plain_pause = min(2 * self._plain_pause, _MOST_PLAIN)
            self._next_plain = self._steps + self._plain_pause
            self._shorter = not self._shorter
            lengths = np.maximum(lengths - 1, 0) if self._shorter else np.zeros_like(lengths)
        self._behind = bool((self._lag(batch) * (lengths > 0)).max() > 2)
        return lengths

    def forget(self, slots: list[SlotId]) -> None:
        """The slots were assigned anew: what their drafters had seen is void, even if the same sequence comes back."""
        self._arrivals[slots] = -1

    def learn(self, outcome: Outcome | None, rows: int, step_seconds: float, draft_seconds: float, pure: bool) -> None:
        """Take in a step: its drafts (None: it had none), its rows with theirs, and what it took in seconds.

        step_seconds: all of it but proposing; pure: it did nothing else of weight.
        """
        self._steps += 1
        if not self.on:
            seconds = step_seconds + draft_seconds
            self._credit = min(self._credit + _PROBE_SHARE * seconds, max(self._credit, _MOST_CREDIT * seconds))
        telling = pure and (rows != self._last_rows or self._steps % _LASTING == 0)
        self._last_rows = rows
        if telling:
            self.rows.learn(rows, step_seconds - (self._learn_asking(outcome, rows, step_seconds) if outcome else 0.0))
        if outcome is None:
            return
        pass_seconds = draft_seconds / min(int(outcome.asked.max()), self._passes)
        # One that had to catch up as well took no less than it would have.
        if telling and (not self._behind or pass_seconds < self.passes.one(len(outcome.slots))):
            self.passes.learn(len(outcome.slots), pass_seconds)
        self._drafted_to[outcome.slots] = outcome.known
        self._proposed += 0.02 * (float(outcome.drafted.sum() / outcome.asked.sum()) - self._proposed)
        if self._probing:
            gained = self.rows.one(rows - int(outcome.drafted.sum())) * (1 + outcome.accepted.sum() / self._looked_at)
            self._pay(step_seconds + draft_seconds - float(gained) - self._estimate)
            self._probed(outcome)
        self.acceptance.learn(outcome.slots, outcome.asked - outcome.branched, outcome.accepted)

    def _learn_asking(self, outcome: Outcome, rows: int, step_seconds: float) -> float:
        """Seconds that asking took in the step. It can be told from the time of further rows only where these are few;
        else it counts as theirs."""
        decoding = rows - int(outcome.drafted.sum())
        plain, share = self.rows.one(decoding), len(outcome.slots) / decoding
        if rows <= _FEW_MORE * decoding and plain > 0.0:
            change = (step_seconds - self.rows.one(rows)) / plain - share * self._asking
            self._asking += _ASKING_RATE * share * min(max(change, -_MOST_ASKING), _MOST_ASKING)
            self._asking = min(max(self._asking, 0.0), _MOST_ASKING)
        return self._asking * share * plain

    # --- choosing ---

    def _enter(self, batch: Candidates) -> None:
        fresh = batch.slots[self._arrivals[batch.slots] != batch.arrivals]
        if len(fresh):
            self._arrivals[batch.slots] = batch.arrivals
            self._drafted_to[fresh] = 0
            self.acceptance.enter(fresh)

    def _best(self, batch: Candidates) -> IntArray:
        """The lengths of most tokens per second among those that draft; sets `on`: whether not to is worse."""
        plain = self.rows.one(batch.decoding)
        chances = self.acceptance.chances(batch.slots) * (self._places < batch.limits[:, None])
        catching_up = self._catching_up(batch)
        chances[catching_up > plain / batch.decoding] = 0.0
        above = chances > _THRESHOLDS[:, None, None]
        counts, gains = above.sum(axis=1), (above * chances).sum(axis=1)  # [H, K]
        tokens, drafts = np.cumsum(gains, axis=1), np.cumsum(counts, axis=1)
        # What else the step computes takes its time either way.
        seconds = plain - self.rows.one(batch.rows) + self.rows.at(batch.rows + self._proposed * drafts)
        seconds += np.cumsum(self.passes.at(counts) * (self._places < self._passes), axis=1)
        seconds += (above[:, :, 0] @ catching_up + counts[:, 0] * self._asking * plain / batch.decoding)[:, None]
        scores = (batch.decoding + tokens) / np.maximum(seconds, 1e-9)
        scores[(drafts > batch.budget) | (drafts == 0)] = 0.0
        height, depth = divmod(int(scores.argmax()), scores.shape[1])
        if self.on and scores[self._choice] >= _KEPT * scores[height, depth]:
            height, depth = self._choice
        self._looked_at = batch.decoding
        without = batch.decoding / max(plain, 1e-9)
        self.on = bool(scores[height, depth] > without * (_KEPT if self.on else _ENTRY))
        self._loss = max(float(seconds[height, depth] * (1.0 - scores[height, depth] / without)), 0.0)
        self._choice = height, depth
        return np.asarray(above[height, :, : depth + 1].sum(axis=1), np.int32)

    def _lag(self, batch: Candidates) -> IntArray:
        """[S]: known tokens that the drafter has not seen, but for those of the last step."""
        return batch.known - self._drafted_to[batch.slots]

    def _catching_up(self, batch: Candidates) -> Floats:
        """[S]: seconds for that, spread over what the sequence may still say; at the target's costs of many rows,
        scaled as those of one. Only a draft model of its own has a cache to fill."""
        if self._info.method not in ("model", "hybrid"):
            return np.zeros(len(batch.slots))
        scale = min(self.passes.one(1) / max(self.rows.one(1), 1e-9), 1.0)
        spread = np.clip(batch.left, 1, _HORIZON)
        return np.asarray(self._lag(batch) * (scale * self.rows.slope) / spread, np.float64)

    # --- while nothing is drafted ---

    def _look(self, batch: Candidates, lengths: IntArray) -> IntArray:
        """No drafts are worth it, as far as known, not even the best, `lengths`. Perhaps try these all the same, or a
        short one of the sequence where that is cheapest: as far as probes may cost."""
        self.rows.relax(batch.decoding, _RELAXED)
        self._next_look = self._steps + self._pause
        whole = self._catching_up(batch) * np.clip(batch.left, 1, _HORIZON)
        loss = self._loss + float(whole @ (lengths > 0))
        if loss > self._credit or not lengths.any():
            lengths = np.zeros_like(lengths)
            single = int(np.where(batch.limits > 0, whole, np.inf).argmin())
            lengths[single] = count = min(int(batch.limits[single]), _PROBE_TOKENS, batch.budget)
            more = self.rows.one(batch.rows + count) - self.rows.one(batch.rows)
            # A pass that takes longer than a step is more likely to have been measured badly.
            loss = count * min(self.passes.one(1), self.rows.one(1)) + more + float(whole[single])
        if loss > self._credit:
            return np.zeros_like(lengths)
        self._pay(loss)
        self._estimate = loss
        self._pause, self._probing = min(2 * self._pause, _LONGEST), True
        chances = self.acceptance.chances(batch.slots)[lengths > 0]
        self._hoped = float(np.take_along_axis(chances, lengths[lengths > 0, None] - 1, axis=1).mean())
        return lengths

    def _pay(self, seconds: float) -> None:
        self._credit = max(self._credit - seconds, -_MOST_CREDIT * self.rows.one(self._looked_at))

    def _probed(self, outcome: Outcome) -> None:
        """A draft that was all right, where few would have been, calls for another one soon."""
        self.acceptance.fade(outcome.slots, _FADED)
        if self._hoped < _LIKELY and (outcome.accepted == outcome.asked - outcome.branched).all():
            self._pause, self._next_look = _SHORTEST, self._steps
