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


class Growth:
    """Gives tables room: from their own windows, what nobody uses, by pruning, then by preemption."""

    def __init__(
        self,
        config: SchedulerConfig,
        cache: CacheManager,
        pruning: Pruning,
        policy: Policy,
        running: list[SequenceState],
        preempt: Callable[[SequenceState, bool], None],
    ) -> None:
        """`running` is the scheduler's own list; `preempt` takes a sequence out of it, see `Scheduler`."""
        self._config = config
        self._cache = cache
        self._pruning = pruning
        self._policy = policy
        self._running = running
        self._preempt = preempt

    def together(self, sequences: list[SequenceState], decodes: DecodeBatch, draft: BatchDraft) -> bool:
        """A new page for each head of all the steady decodes given; False, and nothing done, if that is not so simple.

        It is not if pages or budget are short, or heads differ. Otherwise each sequence costs a few microseconds.
        """
        needed = len(sequences) * self._config.num_rows
        if len(sequences) > draft.budget or needed > self._cache.available or self._config.row_windows is not None:
            return False
        if any(sequence.table.ragged for sequence in sequences):
            return False
        ids = self._cache.take(needed)
        per_sequence = ids.reshape(len(sequences), -1)
        columns = [sequence.table.add_column(own) for sequence, own in zip(sequences, per_sequence, strict=True)]
        draft.add_columns(sequences, columns, ids)
        for sequence in sequences:
            decodes.grown(sequence)
            draft.promise(sequence)
        return True

    def grow(self, sequence: SequenceState, count: int, draft: BatchDraft) -> bool:
        """Make room for `count` entries; False if the sequence had to go itself, or to wait a step."""
        drops: list[tuple[IntArray, int]] = []
        if self._config.row_windows is not None:
            drops, freed = sequence.table.drop_unseen(self._config.row_windows)
            self._cache.give(freed)
        lacking = sequence.table.lacking(count)
        needed = int(lacking.sum())
        while needed > self._cache.available:
            if self._pruning.relieve(needed, self._running, draft):
                draft.wait(sequence, drops)
                return False
            if len(self._running) == 1:
                enough = self._cache.drop_pins(needed)
                assert enough, "a sequence that was admitted does not fit the pool alone"
                break
            victim = self._victim(draft)
            if self._waits(sequence, victim, draft):
                draft.owed += needed
                draft.wait(sequence, drops)
                return False
            self._preempt(victim, victim in draft.compactions)
            draft.forget(victim)
            if victim is sequence:
                return False
        ids = self._cache.take(needed)
        rows, columns = sequence.table.grow(lacking, ids)
        slots = np.full(needed, sequence.slot, np.int32)
        draft.change_pages(sequence, drops, PageGrants(slots, rows, columns, ids))
        return True

    def _victim(self, draft: BatchDraft) -> SequenceState:
        """Who goes when pages are short: the last in line, of those that come back as they are if there are such.

        Never one that is in this step already: its tokens and pages are promised.
        """
        idle = [sequence for sequence in self._running if not sequence.in_flight]
        whole = [sequence for sequence in idle if self._comes_back_whole(sequence, draft)]
        return max(whole or idle, key=lambda sequence: position(self._policy, sequence))

    def _comes_back_whole(self, sequence: SequenceState, draft: BatchDraft) -> bool:
        """Whether preempting the sequence now changes nothing of what it says."""
        return sequence.is_exact or (sequence not in draft.compactions and self._cache.swaps.takes(sequence))

    def _waits(self, sequence: SequenceState, victim: SequenceState, draft: BatchDraft) -> bool:
        """Whether the sequence waits a step for pages, because the victim would not come back as it is.

        If it is the victim itself, it waits while others move. One that is compacted in this very step can be swapped
        out in the next.
        """
        if self._comes_back_whole(victim, draft):
            return False
        if victim is sequence and any(other.in_flight for other in self._running):
            return True
        return victim in draft.compactions and self._cache.swaps.takes(victim)
