"""`Pruning`: when a sequence forgets, and how far. What exactly, the engine chooses by the sequence's policy.

Two phases, because only the engine knows the scores and only the scheduler owns the pages:

    plan n     orders a prune: "keep so many entries per head"
    step n     computes, then chooses what to keep and reports how many entries of each head that is
    plan n+1   compacts: says where the survivors go; the pages left behind are free from there on

Between the choice and the compaction the sequence computes nothing.
"""

from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from ..core.plan import Compaction, IntArray, PruneOrder
from ..core.pruning import PruneCounts
from .batch import BatchDraft
from .cache_manager import CacheManager
from .config import SchedulerConfig
from .prune_state import PruneState
from .sequence import SequenceState

REPEATED_AT_ONCE = 2048
"""Tokens that the model repeats after one instruction (KVzip, Kim et al. 2025)."""
REPEATED_LEAD = 8
"""Tokens of the last chunk that a later instruction ends with, so that the model knows where it is."""
LEAST_REPEATED = 8
"""A shorter repetition would be mostly instruction."""


class Pruning:
    """Orders prunes, turns the engine's answers into compactions, and counts both."""

    def __init__(self, config: SchedulerConfig, cache: CacheManager) -> None:
        self._config = config
        self._cache = cache
        self._chosen: list[SequenceState] = []
        """Whose counts came with the last commit."""
        self._totals: dict[str, PruneCounts] = {}
        """By policy."""
        self.lossy_preemptions = 0
        """Sequences preempted after they were pruned, which do not come back as they were."""

    def counts(self) -> dict[str, PruneCounts]:
        """What each policy has done so far; does not change any more."""
        return {name: replace(total, prunes=dict(total.prunes)) for name, total in self._totals.items()}

    def compact(self, draft: BatchDraft) -> list[SequenceState]:
        """Take back what the sequences that were just asked can spare; first of all in a plan. Returns who they are."""
        chosen, self._chosen = self._chosen, []
        asked = []
        for sequence in chosen:
            state = sequence.prune
            if sequence.slot is None or state is None or state.counts is None:
                continue
            asked.append(sequence)
            counts, state.counts = state.counts, None
            dropped, before = int(sequence.table.kept.sum() - counts.sum()), self._cache.available
            done, pages = self._cache.compact(sequence, counts) if dropped else (False, None)
            state.denied = not done
            if done:
                state.pruned = True
                draft.compactions[sequence] = Compaction(sequence.slot, counts, pages)
                self._count(state, dropped, self._cache.available - before)
                self._cache.publish_pruned(sequence)
            state.context_done |= sequence.num_computed >= state.prefill_end
        return asked

    def order_if_due(self, sequence: SequenceState, draft: BatchDraft) -> None:
        """Order the prune that the sequence's parameters ask for after what it computes in this step."""
        state = sequence.prune
        if state is None or state.params.when == "pressure":
            return
        reason = self._due(sequence, state)
        if reason and (self._ratio(sequence, state) > 1 or state.params.budget == "threshold"):
            self._order(sequence, state, reason, draft)
        elif reason and sequence.num_computed >= state.prefill_end:
            # A look that found too little to forget counts as one.
            state.last, state.denied = sequence.num_stored, False

    def repeats(self, sequence: SequenceState) -> bool:
        """Whether the model must repeat more of the sequence before it goes on.

        One that leaves context or step too little room for that is not pruned at all.
        """
        state = sequence.prune
        if state is None or not self._config.policies[state.params.policy].repeats:
            return False
        left = state.prefill_end - state.repeated
        if sequence.num_computed < state.prefill_end or not left:
            return False
        return self._room(sequence, self._config.max_batch_tokens) >= min(left, LEAST_REPEATED)

    def least_step(self, sequences: Iterable[SequenceState]) -> int:
        """Tokens that a step must take so that whoever of these must repeat something gets on; 0 if nobody must."""
        return max((self._overhead(one) + LEAST_REPEATED for one in sequences if self.repeats(one)), default=0)

    def repetition(self, sequence: SequenceState, draft: BatchDraft) -> tuple[tuple[int, ...], int]:
        """What to compute for that within the draft's budget, and how many tokens of the sequence it repeats.

        None where others leave the step too little room. Then who comes after it gets none either: room would only
        become less.
        """
        state = sequence.prune
        assert state is not None
        left, start = state.prefill_end - state.repeated, state.repeated
        count = min(left, self._room(sequence, draft.budget), REPEATED_AT_ONCE)
        if count < min(left, LEAST_REPEATED):
            draft.budget = 0
            return (), 0
        lead = sequence.tokens[max(start - REPEATED_LEAD, 0) : start]
        return (*sequence.request.repeat_ids, *lead, *sequence.tokens[start : start + count]), count

    def _room(self, sequence: SequenceState, budget: int) -> int:
        """Tokens that can be repeated in a step of `budget` tokens, behind the sequence's own."""
        behind = self._config.max_length - 1 - sequence.num_computed
        return min(budget, behind) - self._overhead(sequence)

    def _overhead(self, sequence: SequenceState) -> int:
        """Tokens before those: the instruction, and the end of what was repeated last."""
        assert sequence.prune is not None
        return len(sequence.request.repeat_ids) + min(sequence.prune.repeated, REPEATED_LEAD)

    def repeated(self, sequence: SequenceState) -> None:
        """The model has repeated what was planned."""
        state = sequence.prune
        assert state is not None
        state.repeated, state.repeating = state.repeated + state.repeating, 0

    def relieve(self, needed: int, running: Sequence[SequenceState], draft: BatchDraft) -> bool:
        """Prune whom it harms least until `needed` pages come free with the next plan, if that may be and can be.

        Least harmed is who holds most in proportion to what it must keep. True if pages will come: then the sequence
        that needs them waits a step. Each such prune leaves less to forget, so waiting ends.
        """
        missing = draft.reserved + needed - self._cache.available - draft.relief
        for sequence, state in self._candidates(running, draft):
            if missing <= 0:
                break
            missing -= self._order(sequence, state, "pressure", draft)
        if not draft.relief:
            return False
        draft.reserved += needed
        draft.owed += needed
        return True

    def relieve_alone(self, sequence: SequenceState, draft: BatchDraft) -> bool:
        """Prune the only one that runs, which does not fit unpruned; False if it is not such a one, or fits nothing.

        Its prune was put off: what was chosen is forgotten when it gives its slot back.
        """
        state = sequence.prune
        if state is None or not state.bounded or self._ratio(sequence, state) <= 1:
            return False
        self._order(sequence, state, "pressure", draft)
        return True

    def preempted(self, sequence: SequenceState) -> None:
        """The sequence is about to lose its slot; it was swapped out, or not."""
        state = sequence.prune
        if state is not None:
            state.cancel()
            state.begins_again = sequence.base is not None and sequence.swapped is None
            self.lossy_preemptions += not (sequence.is_exact or sequence.swapped or state.begins_again)

    def entered(self, sequence: SequenceState) -> None:
        """The sequence has got its slot, and what it begins with."""
        state = sequence.prune
        if state is not None:
            self.lossy_preemptions += state.begins_again and sequence.base is None
            state.begins_again = False

    def commit(self, sequences: Sequence[SequenceState], kept: Sequence[IntArray], seconds: Sequence[float]) -> None:
        """What the engine would keep of the `sequences` that the plan ordered to be pruned, in its order."""
        for sequence, counts, time in zip(sequences, kept, seconds, strict=True):
            state = sequence.prune
            assert state is not None
            self._total(state).seconds += time
            # One that has ended meanwhile, or gave its slot back, has no pages any more.
            if sequence.slot is None or sequence.done:
                continue
            state.counts, state.last = counts, sequence.num_computed
            self._chosen.append(sequence)

    def _due(self, sequence: SequenceState, state: PruneState) -> str:
        """Why to prune after the tokens in flight; empty if there is no reason."""
        computed = sequence.num_stored
        if self._config.policies[state.params.policy].repeats:
            # Once, when all is repeated: of what comes later nothing was seen.
            done = state.repeated + state.repeating >= state.prefill_end and (state.repeating or state.denied)
            return "prompt" if done else ""
        if sequence.num_computed < state.prefill_end:
            return "prompt" if state.params.chunked or computed >= state.prefill_end else ""
        if state.denied:
            return state.reason if computed - state.last >= self._config.page_size else ""
        every = state.params.every
        return "decode" if every and computed - max(state.last, state.prefill_end) >= every else ""

    def _candidates(
        self, running: Iterable[SequenceState], draft: BatchDraft
    ) -> list[tuple[SequenceState, PruneState]]:
        """Who can be pruned under pressure, least harmed first."""
        found: list[tuple[float, SequenceState, PruneState]] = []
        for sequence in running:
            state = sequence.prune
            if state is None or sequence.done or sequence in draft.prunes or not self._may_be_pruned(state):
                continue
            computed = sequence.num_stored
            relieves = self._config.policies[state.params.policy].relieves
            waits = computed < state.prefill_end and not state.params.chunked
            if not relieves or waits or not computed or (state.denied and computed == state.last):
                continue
            ratio = self._ratio(sequence, state)
            if ratio > 1 and self._gain(sequence, state):
                found.append((ratio, sequence, state))
        found.sort(key=lambda candidate: -candidate[0])
        return [(sequence, state) for _, sequence, state in found]

    def _may_be_pruned(self, state: PruneState) -> bool:
        """Whether pages may be had from it between its own prunes: if it has such, they only come a little earlier."""
        params = state.params
        return self._config.prunes_under_pressure or (params.when == "always" and params.every > 0)

    def _order(self, sequence: SequenceState, state: PruneState, reason: str, draft: BatchDraft) -> int:
        """Returns how many pages that will surely make available."""
        assert sequence.slot is not None
        draft.prunes[sequence] = PruneOrder(sequence.slot, _target(sequence, state))
        state.reason = reason
        gain = self._gain(sequence, state)
        draft.relief += gain
        return gain

    def _ratio(self, sequence: SequenceState, state: PruneState) -> float:
        """What it holds after this step in proportion to what it must keep."""
        fresh = sequence.num_stored - sequence.num_computed
        held = float(sequence.table.kept[self._config.full_rows].mean()) + fresh
        return held / _target(sequence, state)

    def _gain(self, sequence: SequenceState, state: PruneState) -> int:
        return self._cache.gain(sequence, _target(sequence, state))

    def _total(self, state: PruneState) -> PruneCounts:
        return self._totals.setdefault(state.params.policy, PruneCounts())

    def _count(self, state: PruneState, entries: int, pages: int) -> None:
        total = self._total(state)
        total.entries += entries
        total.pages += pages
        total.prunes[state.reason] = total.prunes.get(state.reason, 0) + 1


def _target(sequence: SequenceState, state: PruneState) -> int:
    """Entries per head that are to stay: of the context while that is computed, else of all that is known."""
    inside = sequence.num_stored <= state.prefill_end
    return state.params.target(state.prefill_end if inside else len(sequence.tokens))
