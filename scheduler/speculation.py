"""`Speculation`: lets sequences of a step draft, where that pays and costs nobody anything; and keeps count of it.

Drafts are planned last, with what a step has left: tokens of its budget, and pages that nobody else waits for. Lengths
end where a sequence does, and where it is to be looked at for pruning, so its text is the same with drafts or without.
"""

import time
from collections.abc import Callable

import numpy as np

from ..core.plan import NO_TOKEN, BatchPlan, Decodes, IntArray, SequenceOutput, SequencePlan, StepOutput
from ..core.speculation import DraftInfo, SpeculationCounts
from .batch import BatchDraft
from .config import SchedulerConfig
from .decodes import DecodeBatch
from .draft_batch import Candidates, Lengths, Outcome
from .draft_length import DraftLengths
from .growth import Growth
from .sequence import SequenceState

_COLD = 2
"""Steps after one that did more, such as a prompt, which take longer than others."""


class Speculation:
    """Plans drafts, learns from what came of them, and counts."""

    def __init__(
        self, config: SchedulerConfig, decodes: DecodeBatch, growth: Growth, clock: Callable[[], float]
    ) -> None:
        """`clock` gives seconds; steps are timed by it, from the end of one to the end of the next."""
        info = config.draft
        assert info is not None
        self._most = info.most
        self._clock = clock
        self._since: float | None = None
        """When the step in flight began; None: none is."""
        self._thought = 0.0
        """Seconds of it that went into whether and what to draft: a step without a drafter would not have them."""
        self._decodes = decodes
        self._growth = growth
        self._num_slots = config.max_num_seqs
        self.lengths = DraftLengths(info, config.max_num_seqs)
        self._foreseen: IntArray | None = None
        """[N]: what n-grams would propose in the next step, 0: nothing; None: it was not asked for in the last one."""
        self._some_foreseen = False
        self._pure = 0
        """Steps in a row that did nothing but generate."""
        self._asked = [0] * (1 + info.most)
        """How often each length was planned."""
        self._places = np.arange(info.most)
        self._accepted_per_position = [0] * info.most
        self._drafts = self._draft_tokens = 0
        self._draft_seconds = self._step_seconds = 0.0
        self._cached_tokens = self._computed_tokens = 0

    def renew(self, info: DraftInfo) -> None:
        """Another model drafts from now on, of the same method: what was learnt of drafts is void. What rows of the
        target cost still holds."""
        known = self.lengths.costs
        self.lengths = DraftLengths(info, self._num_slots)
        self.lengths.costs.rows, self.lengths.costs.plain = known.rows, known.plain
        self._foreseen, self._some_foreseen = None, False
        if self._since is not None:
            self._since = self._clock()  # the exchange is no part of a step

    def pause(self) -> None:
        """What passes until the next plan is no part of a step; none is in flight."""
        self._since = None

    def counts(self) -> SpeculationCounts:
        """Totals so far."""
        return SpeculationCounts(
            drafts=self._drafts,
            draft_tokens=self._draft_tokens,
            accepted_tokens=sum(self._accepted_per_position),
            accepted_per_position=self._accepted_per_position.copy(),
            lengths=self._asked.copy(),
            draft_seconds=self._draft_seconds,
            step_seconds=self._step_seconds,
            cached_tokens=self._cached_tokens,
            computed_tokens=self._computed_tokens,
        )

    def wants(self, decodes: Decodes) -> bool:
        """Whether a step of these rows would perhaps draft: then it is not to be planned before its time."""
        return not self.lengths.idle(len(decodes)) and bool(self._decodes.draft_limits(decodes, self._most)[1].any())

    def skip(self, decodes: Decodes) -> None:
        """A step of these rows was planned without asking."""
        self._asked[0] += self._decodes.speculating(decodes)
        self._begin()

    def plan(self, draft: BatchDraft) -> None:
        """Let members of the step, which is otherwise complete, draft."""
        decoding = len(draft.decoders)
        if not (draft.members or draft.entered) and self.lengths.idle(decoding):
            self.skip(draft.decodes)
            return
        started = time.perf_counter()
        if draft.entered:
            entered = [assignment.slot for assignment in draft.entered.values()]
            self.lengths.forget(entered)
            if self._foreseen is not None:
                self._foreseen[entered] = 0
        others = [place for place, part in enumerate(draft.plans) if _may_draft(draft.members[place], part)]
        may_draft, chosen = self._decodes.speculating(draft.decodes) + len(others), np.empty(0, np.int32)
        decoding += len(others)
        draft.foresee = self.lengths.foresees(decoding) and (
            may_draft > 0 or any(member.request.speculate for member in draft.members)
        )
        asks = self._some_foreseen or not self.lengths.only_foreseen(decoding)
        if may_draft and asks and not self.lengths.idle(decoding):
            batch = self._candidates(draft, others)
            if batch.budget and batch.limits.any():
                lengths = self.lengths.choose(batch)
                if lengths.most.any():
                    chosen = self._let_draft(draft, others, lengths)
        self._asked[0] += may_draft - len(chosen)
        if len(chosen):
            self._asked = (np.bincount(chosen, minlength=1 + self._most) + self._asked).tolist()
        self._thought += time.perf_counter() - started
        self._begin()

    def _begin(self) -> None:
        if self._since is None:
            self._since = self._clock()

    def commit(self, plan: BatchPlan, output: StepOutput, goes_on: bool) -> None:
        """Learn from a step, once all its results are taken in; `goes_on`: there is more work."""
        now, started = self._clock(), time.perf_counter()
        seconds = now - (now if self._since is None else self._since)
        self._since = now if goes_on else None
        self._step_seconds += seconds
        if not (plan.sequences or plan.foresee or plan.asks_drafts) and self.lengths.rests(seconds):
            self._foreseen, self._some_foreseen, self._thought = None, False, 0.0
            return
        self._draft_seconds += output.draft_seconds + output.foresight_seconds
        self._cached_tokens += output.caught_up.cached
        self._computed_tokens += output.caught_up.computed
        if any(output.recalled):
            self.lengths.recall([assignment.slot for assignment in plan.assignments], output.recalled)
        self._see(plan, output.foreseen)
        rows, outcome = plan.num_tokens, _outcome(plan, output)
        self._pure += 1
        if rows > len(plan.decodes) + len(plan.sequences) or (
            plan.assignments or plan.prunes or plan.compactions or plan.parks
        ):
            self._pure = 0
        if outcome is not None:
            rows += int(outcome.drafted.sum())
            self._count(outcome)
        thought = output.foresight_seconds + self._thought
        rest = max(seconds - output.draft_seconds - (output.foresight_seconds if outcome is not None else thought), 0.0)
        self.lengths.learn(outcome, rows, rest, output.draft_seconds, self._pure > _COLD, thought)
        self._thought = time.perf_counter() - started

    def _see(self, plan: BatchPlan, foreseen: IntArray | None) -> None:
        """What n-grams would propose after the step."""
        self._some_foreseen, self._foreseen = foreseen is not None and bool(foreseen.any()), None
        if foreseen is not None:
            self._foreseen = np.zeros(self._num_slots, np.int32)
            if self._some_foreseen:
                slots = plan.decodes.slots
                if plan.sequences:
                    slots = np.append(slots, [part.slot for part in plan.sequences]).astype(np.int32)
                self._foreseen[slots] = foreseen

    def _count(self, outcome: Outcome) -> None:
        self._drafts += int(np.count_nonzero(outcome.drafted))
        self._draft_tokens += int(outcome.drafted.sum())
        reached = (self._places < outcome.accepted[:, None]).sum(axis=0)
        self._accepted_per_position = (reached + self._accepted_per_position).tolist()

    def _candidates(self, draft: BatchDraft, others: list[int]) -> Candidates:
        """The rows of the step's decode batch, then the `others` of its members."""
        decodes, most = draft.decodes, self._most
        known, left, limits = decodes.starts + 1, *self._decodes.draft_limits(decodes, most)
        arrivals, slots = self._decodes.arrivals(decodes), decodes.slots
        if others:
            states = [draft.members[place] for place in others]
            slots = np.append(slots, [state.slot for state in states]).astype(np.int32)
            arrivals = np.append(arrivals, [state.arrival for state in states])
            known = np.append(known, [len(state.tokens) for state in states]).astype(np.int32)
            left = np.append(left, [state.max_length - len(state.tokens) for state in states]).astype(np.int32)
            ends = [min(state.max_length, state.wakes) - len(state.tokens) - 1 for state in states]
            limits = np.append(limits, np.clip(ends, 0, most)).astype(np.int32)
        if draft.prunes:
            # What is forgotten after this step is chosen among entries that are there to stay.
            members = [*draft.decoders, *(draft.members[place] for place in others)]
            limits[[member in draft.prunes for member in members]] = 0
        rows = len(decodes) + sum(len(part.token_ids) for part in draft.plans)
        foreseen = None if self._foreseen is None else self._foreseen[slots]
        return Candidates(slots, arrivals, known, left, limits, len(slots), rows, draft.budget, foreseen)

    def _let_draft(self, draft: BatchDraft, others: list[int], lengths: Lengths) -> IntArray:
        """Let the candidates [S] draft as far as pages allow; returns the lengths that are left [S]."""
        steady = len(draft.decoders)
        most, by_model = lengths.most.copy(), lengths.model
        most[:steady] = self._growth.decodes_ahead(most[:steady], draft)
        if steady and most[:steady].max() > 0:
            columns = most[:steady], np.minimum(by_model[:steady], most[:steady])
            draft.draft(self._decodes.let_draft(draft.decodes, *columns))
        if not others:
            return most
        rows = steady + np.flatnonzero(most[steady:])
        places = [others[row - steady] for row in rows.tolist()]
        most[rows] = self._growth.ahead([draft.members[place] for place in places], most[rows].tolist(), draft)
        for place, row in zip(places, rows.tolist(), strict=True):
            draft.extend(place, int(most[row]), int(min(by_model[row], most[row])))
        return most


def _may_draft(sequence: SequenceState, part: SequencePlan) -> bool:
    """Whether one that is no steady decode computes its newest token, and may draft after it."""
    decodes = part.sample and sequence.decodes and sequence.num_generated > 0
    return decodes and not part.score_ids and sequence.request.speculate


def _outcome(plan: BatchPlan, output: StepOutput) -> Outcome | None:
    """What came of the step's drafts; None if there were none."""
    columns = _steady_outcome(plan, output)
    results = zip(plan.sequences, output.sequences, strict=True)
    others = [_numbers(part, result) for part, result in results if part.drafts and result.error is None]
    if others:
        columns = np.concatenate([columns, np.array(others, np.int32).T], axis=1)
    return Outcome(*columns) if columns.shape[1] else None


def _steady_outcome(plan: BatchPlan, output: StepOutput) -> IntArray:
    """[8, S]: an `Outcome` of the step's decodes."""
    decodes, runs = plan.decodes, output.runs
    if decodes.drafts is None or decodes.model_drafts is None:
        return np.empty((8, 0), np.int32)
    columns: IntArray = np.zeros((8, len(decodes)), np.int32)
    columns[0], columns[1], columns[2] = decodes.slots, decodes.drafts, decodes.model_drafts
    columns[6] = decodes.starts + 2
    if runs is not None:
        columns[3], columns[4], columns[5], columns[7] = (
            runs.drafted,
            runs.model_drafted,
            runs.counts - 1,
            runs.branched,
        )
        columns[6] += columns[5]
    telling = (decodes.drafts > 0) & (output.decoded != NO_TOKEN)
    return columns if telling.all() else columns[:, telling]


def _numbers(part: SequencePlan, result: SequenceOutput) -> tuple[int, ...]:
    """One row of an `Outcome`."""
    asked_model = part.drafts if part.model_drafts is None else part.model_drafts
    accepted, known = len(result.token_ids) - 1, part.start + len(part.token_ids) + len(result.token_ids)
    return (part.slot, part.drafts, asked_model, result.drafted, result.model_drafted, accepted, known, result.branched)
