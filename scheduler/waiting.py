"""`WaitingQueue`: in the order of arrival; preempted sequences before new ones."""

import math
from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Iterator

from .sequence import SequenceState

_RECENT = 64
"""Starts from which the drain rate is measured."""
_LONGEST_RETRY = 60.0
"""Seconds; a longer promise would be a guess."""


class WaitingQueue:
    """Sequences without a slot, in the order in which they will get one."""

    def __init__(self) -> None:
        self._preempted: list[SequenceState] = []
        """Oldest arrival first."""
        self._new: OrderedDict[int, SequenceState] = OrderedDict()
        """By arrival number: removing from the middle (aborts) costs as little as from the front."""
        self._starts: deque[float] = deque(maxlen=_RECENT)
        """Clock times at which new sequences left the queue to run."""

    def __len__(self) -> int:
        return len(self._preempted) + len(self._new)

    def __iter__(self) -> Iterator[SequenceState]:
        yield from self._preempted
        yield from self._new.values()

    def add(self, sequence: SequenceState) -> None:
        """Enqueue a new arrival."""
        self._new[sequence.arrival] = sequence

    def put_back(self, sequence: SequenceState) -> None:
        """Enqueue a preempted sequence before all new ones."""
        insort(self._preempted, sequence, key=lambda waiting: waiting.arrival)

    def start(self, sequence: SequenceState, now: float) -> None:
        """Take out one that runs from clock time `now` (seconds) on."""
        if sequence.arrival in self._new:
            self._starts.append(now)
        self.remove(sequence)

    def remove(self, sequence: SequenceState) -> None:
        """Take out one that will not run any more."""
        if self._new.pop(sequence.arrival, None) is None:
            self._preempted.remove(sequence)

    def retry_after(self, places: int, now: float) -> float:
        """Whole seconds, 1 to 60, until `places` sequences will probably have left, by the recent rate of starts."""
        if not self._starts:
            return 1.0
        seconds_per_start = (now - self._starts[0]) / len(self._starts)
        return float(min(max(math.ceil(places * seconds_per_start), 1.0), _LONGEST_RETRY))
