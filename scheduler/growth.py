"""`Growth`: pages for the next tokens of those that run, and who waits or goes when there are too few."""

from collections.abc import Callable

import numpy as np

from ..core.plan import IntArray, PageGrants
from .batch import BatchDraft
from .cache_manager import CacheManager
from .config import SchedulerConfig
from .decodes import DecodeBatch
from .policy import Policy, position
from .pruning import Pruning
from .sequence import SequenceState

Drops = list[tuple[IntArray, int]]
"""(rows, leading pages of each) that leave a table."""


class Growth:
    """Gives tables room: from their own windows, what nobody uses, by pruning, then by preemption."""

    def __init__(
        self,
        config: SchedulerConfig,
        cache: CacheManager,
        pruning: Pruning,
        policy: Policy,
        running: list[SequenceState],
        decodes: DecodeBatch,
        preempt: Callable[[SequenceState, bool], None],
    ) -> None:
        """`running` and `decodes` are the scheduler's own; `preempt` takes a sequence out of them, see `Scheduler`."""
        self._config = config
        self._cache = cache
        self._pruning = pruning
        self._policy = policy
        self._running = running
        self._decodes = decodes
        self._preempt = preempt
        self._most_drafts = 0 if config.draft is None else config.draft.most
        self.lends_ahead = False
        """Whether anybody may have pages that only drafts needed."""

    def together(self, sequences: list[SequenceState], draft: BatchDraft) -> bool:
        """A new page for each head of all the steady decodes given; False, and nothing done, if that is not so simple.

        It is not if pages or budget are short, or heads differ. Otherwise each sequence costs a few microseconds.
        """
        needed = len(sequences) * self._config.num_rows
        if len(sequences) > draft.budget or needed > self._cache.available:
            return False
        if not all(self._is_regular(sequence) for sequence in sequences):
            return False
        self._add_columns(sequences, draft)
        for sequence in sequences:
            self._decodes.grown(sequence)
            draft.promise(sequence)
        return True

    def decodes_ahead(self, counts: IntArray, draft: BatchDraft) -> IntArray:
        """`ahead` for the step's steady decodes: `counts` and what they get are [D]."""
        lacks = counts >= self._decodes.rooms(draft.decodes)
        granted = counts.copy()
        if lacks.any():
            lacking = np.flatnonzero(lacks & (counts > 0))
            sequences = [draft.decoders[row] for row in lacking.tolist()]
            granted[lacking] = self.ahead(sequences, counts[lacking].tolist(), draft)
            for sequence in sequences:
                self._decodes.grown(sequence)
        return granted

    def ahead(self, sequences: list[SequenceState], counts: list[int], draft: BatchDraft) -> list[int]:
        """Room for `counts` draft tokens of sequences that have room for their known ones; returns how many get it.

        Drafts push nobody out: they get what is left when all others have theirs, and admission its reserve.
        """
        spare = 0 if draft.waiting else self._cache.available - self._cache.watermark - draft.owed
        granted, together = list(counts), list[SequenceState]()
        for index, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
            room = sequence.table.room - max(sequence.in_flight, 1)
            if count <= room:
                continue
            granted[index] = room
            if count <= room + self._config.page_size and self._is_regular(sequence):
                if self._config.num_rows <= spare:
                    spare -= self._config.num_rows
                    together.append(sequence)
                    granted[index] = count
            elif (taken := self._extend(sequence, count + max(sequence.in_flight, 1), spare, draft)) is not None:
                spare -= taken
                granted[index] = count
        if together:
            self._add_columns(together, draft)
            self._lent_ahead(together)
        return granted

    def _lent_ahead(self, sequences: list[SequenceState]) -> None:
        self.lends_ahead = True
        for sequence in sequences:
            sequence.ahead = self._most_drafts

    def trim(self, sequences: list[SequenceState]) -> bool:
        """Take back what only drafts needed of pages; whether that was any."""
        trimmed = False
        for sequence in sequences:
            if sequence.ahead > 1 and not sequence.done:
                ids = sequence.table.trim(max(sequence.in_flight, 1))
                self._cache.give(ids)
                sequence.ahead = 1
                trimmed |= len(ids) > 0
                if sequence.steady:
                    self._decodes.grown(sequence)
        return trimmed

    def shed(self, sequence: SequenceState) -> None:
        """The sequence is about to go: what it does not need is not to come back with it."""
        self._drop_unseen(sequence)
        self.trim([sequence])

    def trim_all(self) -> bool:
        """The same of all that run."""
        trimmed = self.lends_ahead and self.trim(self._running)
        self.lends_ahead = False
        return trimmed

    def _is_regular(self, sequence: SequenceState) -> bool:
        """Whether its heads are all alike."""
        return self._config.row_windows is None and not sequence.table.ragged

    def _add_columns(self, sequences: list[SequenceState], draft: BatchDraft) -> None:
        ids = self._cache.take(len(sequences) * self._config.num_rows)
        per_sequence = ids.reshape(len(sequences), -1)
        columns = [sequence.table.add_column(own) for sequence, own in zip(sequences, per_sequence, strict=True)]
        draft.add_columns(sequences, columns, ids)

    def _drop_unseen(self, sequence: SequenceState) -> Drops:
        if self._config.row_windows is None:
            return []
        drops, freed = sequence.table.drop_unseen(self._config.row_windows)
        self._cache.give(freed)
        return drops

    def _extend(self, sequence: SequenceState, count: int, spare: int, draft: BatchDraft) -> int | None:
        """Room for `count` entries at the cost of at most `spare` pages; returns the cost, None if it is too high."""
        drops, lacking = self._drop_unseen(sequence), sequence.table.lacking(count)
        needed = int(lacking.sum())
        if needed > spare:
            draft.change_pages(sequence, drops, PageGrants.none())
            return None
        self._hang_in(sequence, drops, lacking, draft)
        self._lent_ahead([sequence])
        return needed

    def _hang_in(self, sequence: SequenceState, drops: Drops, lacking: IntArray, draft: BatchDraft) -> None:
        ids = self._cache.take(int(lacking.sum()))
        rows, columns = sequence.table.grow(lacking, ids)
        slots = np.full(len(ids), sequence.slot, np.int32)
        draft.change_pages(sequence, drops, PageGrants(slots, rows, columns, ids))

    def affordable(self, sequence: SequenceState, count: int) -> int:
        """How many of `count` tokens of a prompt to compute: fewer where pages are short and pruning gives some back.

        So such a prompt takes no more than it keeps and a small chunk, and nobody has to go for a large one.
        """
        prune, least, room = sequence.prune, self._config.least_chunk, sequence.table.room
        if prune is None or not prune.bounded:
            return count
        # Where positions close up, no entry is rotated past the model's context.
        count = min(count, self._config.max_model_len - int(sequence.table.kept.max()))
        if count <= max(least, room):
            return count
        spare = max(self._cache.available - self._cache.watermark, 0) // self._config.num_rows
        return max(least, min(count, room + spare * self._config.page_size))

    def grow(self, sequence: SequenceState, count: int, draft: BatchDraft) -> bool:
        """Make room for `count` entries; False if the sequence had to go itself, or to wait a step."""
        drops, lacking = self._drop_unseen(sequence), sequence.table.lacking(count)
        while (needed := int(lacking.sum())) > self._cache.available:
            if self.trim_all():
                lacking = sequence.table.lacking(count)
                continue
            if self._pruning.relieve(needed, self._running, draft):
                draft.wait(sequence, drops)
                return False
            if len(self._running) == 1:
                enough = self._cache.make_room(sequence, needed)
                if not enough and self._pruning.relieve_alone(sequence, draft):
                    draft.wait(sequence, drops)
                    return False
                assert enough, "a sequence that was admitted does not fit the pool alone"
                break
            victim = self._victim(sequence, draft)
            if self._waits(sequence, victim, draft):
                draft.owed += needed
                draft.wait(sequence, drops)
                return False
            self._preempt(victim, victim in draft.compactions or victim in draft.entered)
            draft.forget(victim)
            if victim is sequence:
                return False
        self._hang_in(sequence, drops, lacking, draft)
        return True

    def _victim(self, asking: SequenceState, draft: BatchDraft) -> SequenceState:
        """Who goes when pages are short: the last in line, of those that come back as they are if there are such.

        Never one that is in this step already: its tokens and pages are promised.
        """
        idle = [sequence for sequence in self._running if not sequence.in_flight]
        whole = [sequence for sequence in idle if self._comes_back_whole(sequence, draft)]
        # Who has just been brought back cannot leave again in the same plan; who has just begun loses nothing.
        stay = {s for s, assignment in draft.entered.items() if assignment.restored is not None}
        whole, idle = ([s for s in group if s not in stay] for group in (whole, idle))
        return max(whole or idle or [asking], key=lambda sequence: position(self._policy, sequence))

    def _comes_back_whole(self, sequence: SequenceState, draft: BatchDraft) -> bool:
        """Whether preempting the sequence now changes nothing of what it says."""
        return sequence.is_exact or (sequence not in draft.compactions and self._cache.swaps.takes(sequence))

    def _waits(self, sequence: SequenceState, victim: SequenceState, draft: BatchDraft) -> bool:
        """Whether the sequence waits a step for pages, because the victim would not come back as it is.

        If it is the victim itself, it waits while others move. One that is compacted in this very step can be swapped
        out in the next.
        """
        entry = draft.entered.get(victim)
        if entry is not None and entry.restored is not None:
            return True
        if self._comes_back_whole(victim, draft):
            return False
        if victim is sequence and any(other.in_flight for other in self._running):
            return True
        return victim in draft.compactions and self._cache.swaps.takes(victim)
