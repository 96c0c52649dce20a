"""Who comes first: the order of the waiting queue, which read from its end names the victims of preemption.

A policy gives each sequence a lane and a rank in it. Lanes are served by their standing, the smallest first; within a
lane by rank, then preempted sequences before new ones, then by arrival. A rank holds while the sequence waits, so the
queue needs no sorting; where waiting counts it is the time of arrival that enters the rank. Nobody waits for ever
under any policy.
"""

import math
from collections import Counter, OrderedDict

from .heap import RemovalHeap
from .prediction import LengthPredictor
from .sequence import SequenceState

PRIORITY_SECONDS = 60.0
"""`priority`: so much longer waiting makes up for one level."""
AGEING_TOKENS = 64.0
"""`sjf`: so many expected tokens are made up for by one second of waiting, about the pace at which one sequence is
decoded: who has waited as long as it will run goes first."""
LONGEST_PREDICTION = 16_384.0
"""`sjf`: tokens beyond which longer is not worse, so that nobody waits more than minutes."""
PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0
"""`fair`: cost of a computed prompt token and of a generated one (Sheng et al. 2024, section 5)."""
_MOST_IDLE_TENANTS = 10_000


class Policy:
    """What the scheduler asks and tells. As it stands here, `fcfs`: first come, first served."""

    takes_pages = False
    """Whether running sequences may be preempted for waiting ones."""

    def lane(self, sequence: SequenceState) -> str:
        """The queue within the queue to which it belongs."""
        return ""

    def standing(self, lane: str) -> float:
        """The smallest is served first. Must not fall while a sequence of the lane waits."""
        return 0.0

    def rank(self, sequence: SequenceState) -> float:
        """Within its lane the smallest is served first."""
        return 0.0

    def outranks(self, waiting: SequenceState, running: SequenceState) -> bool:
        """Whether a waiting sequence that lacks pages may take those of a running one; asked if `takes_pages`."""
        return False

    def arrived(self, sequence: SequenceState) -> None:
        """A new sequence is about to be queued."""

    def started(self, sequence: SequenceState) -> None:
        """It got a slot for the first time; `cached_tokens` of its prompt need no computing."""

    def generated(self, sequences: list[SequenceState]) -> None:
        """Each got a new token; one that is in it twice got two."""

    def left(self, sequence: SequenceState) -> None:
        """It ended, or was given up."""


class Priority(Policy):
    """`priority`: the request's own, lower is sooner; equal ones by arrival.

    A waiting sequence takes pages (never just a slot) from running ones of a larger number. A level is worth
    `PRIORITY_SECONDS` of waiting, so a flood of urgent requests delays the others but does not starve them.
    """

    takes_pages = True

    def rank(self, sequence: SequenceState) -> float:
        """See `Policy.rank`."""
        return sequence.arrived_at + PRIORITY_SECONDS * sequence.request.priority

    def outranks(self, waiting: SequenceState, running: SequenceState) -> bool:
        """See `Policy.outranks`."""
        urgent = waiting.request.priority < running.request.priority
        return urgent and self.rank(waiting) < self.rank(running)


class Fair(Policy):
    """`fair`: the tenant that has received least; its own requests by arrival.

    The virtual token counter (VTC) of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): a tenant
    is charged what is computed for it; one that comes back after a pause is lifted to the smallest counter of those
    that are being served, so that nobody saves up service.
    """

    def __init__(self) -> None:
        self._counters: dict[str, float] = {}
        """Weighted tokens charged to tenants that have unfinished sequences."""
        self._unfinished: Counter[str] = Counter()
        self._least: RemovalHeap[str, None] = RemovalHeap()
        """The same tenants by counters as they were; a counter only grows, so the smallest is put right when asked."""
        self._idle: OrderedDict[str, float] = OrderedDict()
        """Counters of the others, longest idle first."""
        self._last = 0.0
        """Counter of the tenant that was the last to become idle."""

    def lane(self, sequence: SequenceState) -> str:
        """See `Policy.lane`."""
        return sequence.request.tenant

    def standing(self, lane: str) -> float:
        """See `Policy.standing`."""
        return self._counters.get(lane, math.inf)

    def arrived(self, sequence: SequenceState) -> None:
        """See `Policy.arrived`."""
        tenant = sequence.request.tenant
        self._unfinished[tenant] += 1
        if tenant not in self._counters:
            self._counters[tenant] = max(self._idle.pop(tenant, 0.0), self._smallest())
            self._least.push(tenant, self._counters[tenant], None)

    def started(self, sequence: SequenceState) -> None:
        """See `Policy.started`."""
        self._counters[sequence.request.tenant] += PROMPT_WEIGHT * (sequence.num_prompt - sequence.cached_tokens)

    def generated(self, sequences: list[SequenceState]) -> None:
        """See `Policy.generated`."""
        for sequence in sequences:
            self._counters[sequence.request.tenant] += OUTPUT_WEIGHT

    def left(self, sequence: SequenceState) -> None:
        """See `Policy.left`."""
        tenant = sequence.request.tenant
        self._unfinished[tenant] -= 1
        if not self._unfinished[tenant]:
            del self._unfinished[tenant]
            self._least.remove(tenant)
            self._idle[tenant] = self._last = self._counters.pop(tenant)
            if len(self._idle) > _MOST_IDLE_TENANTS:
                self._idle.popitem(last=False)

    def _smallest(self) -> float:
        while (first := self._least.first()) is not None:
            counter, tenant, _ = first
            if counter == self._counters[tenant]:
                return float(counter)
            self._least.push(tenant, self._counters[tenant], None)
        return self._last


class ShortestFirst(Policy):
    """`sjf`: the smallest expected rest of the output first, as far as outputs so far tell; waiting makes up for it.

    A sequence that outlives its prediction is expected to double, as in a multi-level queue: it loses its place, not
    its tokens.
    """

    def __init__(self) -> None:
        self._predictor = LengthPredictor()
        self._expected: dict[int, float] = {}
        """Output tokens expected, by arrival number."""

    def rank(self, sequence: SequenceState) -> float:
        """See `Policy.rank`."""
        expected, done = self._expected.get(sequence.arrival, 0.0), sequence.num_generated
        rest = expected - done if done < expected else done
        return min(rest, LONGEST_PREDICTION) + AGEING_TOKENS * sequence.arrived_at

    def arrived(self, sequence: SequenceState) -> None:
        """See `Policy.arrived`."""
        most = sequence.max_length - sequence.num_prompt
        self._expected[sequence.arrival] = self._predictor.predict(sequence.request.tenant, sequence.num_prompt, most)

    def left(self, sequence: SequenceState) -> None:
        """See `Policy.left`. Given up counts too: a client that found a stop string gives up."""
        del self._expected[sequence.arrival]
        if sequence.num_generated:
            self._predictor.learn(sequence.request.tenant, sequence.num_prompt, sequence.num_generated)


POLICIES: dict[str, type[Policy]] = {"fcfs": Policy, "priority": Priority, "fair": Fair, "sjf": ShortestFirst}


def position(policy: Policy, sequence: SequenceState) -> tuple[float, float, int]:
    """Where a sequence stands among all, the first in line smallest; the largest is the first to be preempted."""
    return policy.standing(policy.lane(sequence)), policy.rank(sequence), sequence.arrival
