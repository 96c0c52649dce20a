"""`Entrance`: lets waiting sequences in, in their order, while there are tokens, slots and pages for them."""

from collections.abc import Callable
from contextlib import closing

from ..core.ids import RequestId, SlotId
from ..core.prefix import Bundle
from .batch import BatchDraft
from .cache_manager import CacheManager
from .config import SchedulerConfig
from .sequence import SequenceState
from .waiting import WaitingQueue


class Entrance:
    """Lends slots; the lists are the scheduler's own."""

    def __init__(
        self,
        config: SchedulerConfig,
        cache: CacheManager,
        waiting: WaitingQueue,
        running: list[SequenceState],
        free_slots: list[SlotId],
    ) -> None:
        self._config = config
        self._cache = cache
        self._waiting = waiting
        self._running = running
        self._free_slots = free_slots

    @property
    def is_open(self) -> bool:
        """Whether it is somebody's turn, and there is a slot."""
        return bool(self._free_slots and self._waiting.num_ready)

    def admit(self, draft: BatchDraft, start: Callable[[SequenceState, BatchDraft], None]) -> None:
        """Start waiting sequences in order, while there are tokens, slots and pages for all their known tokens.

        `start` plans a sequence's first tokens, once it has slot and prefix. The head of the queue is not overtaken: a
        long prompt gets its turn. Only while another sequence computes the very block that it needs next it is passed
        over, and looked at first again in the next step.
        """
        if not (draft.budget and self.is_open):
            return
        prompts = [s for s in self._running if s.num_pending > 1 or self._cache.pruned.is_due(s)]
        passed: set[RequestId] = set()
        with closing(self._waiting.candidates(2 * self._config.max_num_seqs)) as candidates:
            for sequence in candidates:
                if sequence.request.id in passed:  # choices of one request wait for the same
                    continue
                hits = self._cache.find(sequence)
                if any(self._cache.awaits(sequence, hits, other) for other in prompts):
                    passed.add(sequence.request.id)
                    continue
                needed = self._cache.cost(sequence, hits) + draft.owed
                if self._running:
                    needed += self._config.watermark
                if needed > self._cache.available and (self._running or not self._cache.make_room(sequence, needed)):
                    return
                self._enter(sequence, hits, draft)
                start(sequence, draft)
                prompts.append(sequence)
                if not (draft.budget and self._free_slots):
                    return

    def _enter(self, sequence: SequenceState, hits: list[Bundle], draft: BatchDraft) -> None:
        """Lend a waiting sequence a slot; it begins with what the prefix cache has of it."""
        sequence.slot = self._free_slots.pop()
        self._running.append(sequence)
        if sequence.prune is not None and sequence.swapped is None:
            sequence.prune.enter(len(sequence.tokens))
        self._cache.enter(sequence, hits)
        draft.enter(sequence)
        sequence.swapped = None
