"""`Watchdog`: runnable work must move. Who is passed over without reason is named and ended; the others go on.

None of this ever happens unless the scheduler has a fault: it turns a hang into one clear error.
"""

from collections import Counter, OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

from ..core.messages import StuckReason
from .sequence import SequenceState

_Group = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Who is stuck, and how that shows."""

    sequence: SequenceState
    reason: StuckReason
    text: str


class Watchdog:
    """Watches running sequences that no step works on, and waiting ones that others overtake."""

    def __init__(self, *, idle_steps: int = 100, patience: float = 600.0, overtakings: int = 100) -> None:
        """Limits.

        idle_steps: steps with tokens to spare in which a running sequence is not worked on; overtakings: starts of
        sequences of the same tenant and priority that arrived `patience` seconds later or more. Every policy serves
        these nearly in order of arrival, so unlike the length of a wait this is never just load.
        """
        self._idle_steps = idle_steps
        self._patience = patience
        self._overtakings = overtakings
        self._idle: dict[int, int] = {}
        """By arrival number, of running sequences outside the last step: steps since they were in one that had room."""
        self._waiting: dict[_Group, OrderedDict[int, SequenceState]] = {}
        """New sequences by arrival number, the oldest first."""
        self._overtaken: Counter[int] = Counter()
        self._verdicts: list[Verdict] = []

    def arrived(self, sequence: SequenceState) -> None:
        """A new sequence waits."""
        self._waiting.setdefault(_group(sequence), OrderedDict())[sequence.arrival] = sequence

    def started(self, sequence: SequenceState) -> None:
        """It got its first slot."""
        self._forget(sequence)
        group = self._waiting.get(_group(sequence))
        oldest = next(iter(group.values())) if group else None
        if oldest is None or sequence.arrived_at - oldest.arrived_at < self._patience:
            return
        self._overtaken[oldest.arrival] += 1
        if self._overtaken[oldest.arrival] == self._overtakings:
            text = f"{self._overtakings} others like it that came {self._patience:g} s later or more were started"
            self._verdicts.append(Verdict(oldest, "overtaken", text))

    def left(self, sequence: SequenceState) -> None:
        """It ended, or was given up."""
        self._idle.pop(sequence.arrival, None)
        self._forget(sequence)

    def planned(
        self, running: list[SequenceState], planned: int, spare_tokens: int, excused: Collection[SequenceState] = ()
    ) -> None:
        """A step with `planned` of the running sequences comes; it could have taken `spare_tokens` more.

        The `excused` ones have a reason to wait: they lack pages that others hold, who go on.
        """
        if not self._idle and (planned == len(running) or not spare_tokens):
            return
        passed = [sequence for sequence in running if not sequence.in_flight and sequence not in excused]
        could = spare_tokens > 0
        self._idle = {sequence.arrival: self._idle.get(sequence.arrival, 0) + could for sequence in passed}
        for sequence in passed:
            if could and self._idle[sequence.arrival] == self._idle_steps:
                text = f"no step worked on it for {self._idle_steps} steps that had tokens to spare"
                self._verdicts.append(Verdict(sequence, "stalled", text))

    def unplannable(self, sequence: SequenceState) -> None:
        """There is work, but nothing could be planned; this sequence should have been."""
        self._verdicts.append(Verdict(sequence, "unplannable", "no step could be planned for it, nor for any other"))

    def verdicts(self) -> list[Verdict]:
        """Who was found stuck since the last call."""
        found, self._verdicts = self._verdicts, []
        return found

    def _forget(self, sequence: SequenceState) -> None:
        group = self._waiting.get(_group(sequence))
        if group is not None and group.pop(sequence.arrival, None) is not None:
            self._overtaken.pop(sequence.arrival, None)
            if not group:
                del self._waiting[_group(sequence)]


def _group(sequence: SequenceState) -> _Group:
    return sequence.request.tenant, sequence.request.priority
