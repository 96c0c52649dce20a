"""`WaitingQueue`: sequences without a slot, in the order that the policy gives them."""

import math
from collections import Counter, deque
from collections.abc import Generator, Iterator

from .heap import RemovalHeap
from .policy import Policy
from .sequence import SequenceState

_RECENT = 64
"""Starts from which the drain rate is measured."""
_LONGEST_RETRY = 60.0
"""Seconds; a longer promise would be a guess."""

_Lane = RemovalHeap[int, SequenceState]


class WaitingQueue:
    """Lanes of sequences (see `scheduler.policy`). Everything but looking at all of them is O(log n).

    Who is held back, until its grammar is compiled, waits as all do, but it is nobody's turn yet.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._lanes: dict[str, _Lane] = {}
        """None is empty."""
        self._order: RemovalHeap[str, _Lane] = RemovalHeap()
        """The lanes by standing as it was, then by who came first; a standing only grows, so the first is put right
        when it comes up."""
        self._held: dict[int, SequenceState] = {}
        """By arrival number: in no lane."""
        self._size = 0
        self.num_tokens = 0
        """Prompt tokens of all that wait."""
        self.priorities: Counter[str] = Counter()
        """How many wait with a priority `above` (a number below 0), `normal` and `below`."""
        self._starts: deque[tuple[float, int]] = deque(maxlen=_RECENT)
        """Clock times at which new sequences left the queue to run, and their prompt tokens."""

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[SequenceState]:
        """All in their present order, those that are held back last; O(n log n)."""
        waiting = [sequence for lane in self._lanes.values() for sequence in lane]
        waiting.sort(key=lambda s: (self._policy.standing(self._policy.lane(s)), self._key(s)))
        return iter([*waiting, *self._held.values()])

    @property
    def num_held(self) -> int:
        """How many are held back."""
        return len(self._held)

    @property
    def num_ready(self) -> int:
        """How many are not."""
        return self._size - len(self._held)

    def add(self, sequence: SequenceState, held: bool = False) -> None:
        """Enqueue a new arrival, held back until `release` or not, or one that was preempted."""
        if held:
            self._held[sequence.arrival] = sequence
        else:
            self._put(sequence)
        self._count(sequence, 1)

    def release(self, sequence: SequenceState) -> None:
        """It takes the place that its arrival gives it; KeyError if it is not held back."""
        self._put(self._held.pop(sequence.arrival))

    def start(self, sequence: SequenceState, now: float) -> None:
        """Take out one that runs from clock time `now` (seconds) on."""
        if not sequence.preemptions:
            self._starts.append((now, sequence.num_prompt))
        self.remove(sequence)

    def remove(self, sequence: SequenceState) -> None:
        """Take out one that will not run any more; KeyError if it does not wait."""
        if self._held.pop(sequence.arrival, None) is None:
            self._take(sequence)
        self._count(sequence, -1)

    def first(self) -> SequenceState | None:
        """Whose turn it is; None if nobody waits."""
        while (top := self._order.first()) is not None:
            (standing, _), name, lane = top
            head = lane.first()
            assert head is not None, "an empty lane is in the order"
            if standing == self._policy.standing(name):
                return head[2]
            self._order.push(name, (self._policy.standing(name), head[1]), lane)
        return None

    def candidates(self, limit: int) -> Generator[SequenceState, None, None]:
        """The first `limit` in turn. Whom the caller does not start keeps its place; close the iterator."""
        passed: list[SequenceState] = []
        try:
            for _ in range(limit):
                sequence = self.first()
                if sequence is None:
                    return
                yield sequence
                if sequence.slot is None:
                    passed.append(sequence)
                    self._take(sequence)
        finally:
            for sequence in passed:
                self._put(sequence)

    def retry_after(self, places: int, tokens: int, now: float) -> float:
        """Whole seconds, 1 to 60, until `places` sequences and `tokens` prompt tokens will probably have left.

        By the recent rate of starts; at most 0 stands for enough room.
        """
        if not self._starts:
            return 1.0
        elapsed, started = now - self._starts[0][0], sum(count for _, count in self._starts)
        seconds = max(places * elapsed / len(self._starts), tokens * elapsed / started)
        return float(min(max(math.ceil(seconds), 1.0), _LONGEST_RETRY))

    def _put(self, sequence: SequenceState) -> None:
        name = self._policy.lane(sequence)
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = RemovalHeap()
            self._order.push(name, (self._policy.standing(name), sequence.arrival), lane)
        lane.push(sequence.arrival, self._key(sequence), sequence)

    def _key(self, sequence: SequenceState) -> tuple[float, bool, int]:
        return self._policy.rank(sequence), not sequence.preemptions, sequence.arrival

    def _take(self, sequence: SequenceState) -> None:
        name = self._policy.lane(sequence)
        lane = self._lanes[name]
        if not lane.remove(sequence.arrival):
            raise KeyError(sequence.arrival)
        if not lane:
            del self._lanes[name]
            self._order.remove(name)

    def _count(self, sequence: SequenceState, change: int) -> None:
        self._size += change
        self.num_tokens += change * sequence.num_prompt
        priority = sequence.request.priority
        self.priorities["above" if priority < 0 else "below" if priority else "normal"] += change
