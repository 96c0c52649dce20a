"""What a benchmark of speculation counts: tokens and times of the steps at whose beginning all sequences generate."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from quire.core.ids import RequestId
from quire.core.messages import Failed, Finished, StepReport, Tokens, single_events
from quire.core.speculation import SpeculationCounts


@dataclass(slots=True)
class Steady:
    """Sums over the steps at whose beginning all sequences generated."""

    tokens: int = 0
    seconds: float = 0.0
    forward_seconds: float = 0.0
    """Of the target."""
    draft_seconds: float = 0.0
    steps: int = 0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def forward(self) -> float:
        """Seconds of the target's forward pass in a step."""
        return self.forward_seconds / self.steps

    @property
    def draft_share(self) -> float:
        """Of the time, for proposing."""
        return self.draft_seconds / self.seconds

    @property
    def rest_share(self) -> float:
        """Of the time, for neither proposing nor the target's forward pass."""
        return 1 - (self.forward_seconds + self.draft_seconds) / self.seconds


class Watcher:
    """Follows a batch of `size` requests from step to step."""

    def __init__(self, size: int, before: SpeculationCounts, steady: Steady) -> None:
        """steady: sums to add to."""
        self.tokens: dict[RequestId, list[int]] = {}
        self.steady = steady
        self._size = size
        self._ended = False
        self._drafted = before.draft_seconds

    def watch(self, report: StepReport, seconds: float) -> None:
        """Take in a step, which took so long, the report included."""
        stats = report.stats
        steady = len(self.tokens) == self._size and not self._ended
        tokens = 0
        for event in single_events(report.events):
            assert not isinstance(event, Failed), event.error.message
            if isinstance(event, Tokens):
                self.tokens.setdefault(event.request_id, []).extend(event.token_ids)
                tokens += len(event.token_ids)
            self._ended |= isinstance(event, Finished)
        if steady:
            self.steady.steps += 1
            self.steady.tokens += tokens
            self.steady.seconds += seconds
            self.steady.forward_seconds += stats.forward_seconds
            self.steady.draft_seconds += stats.speculation.draft_seconds - self._drafted
        self._drafted = stats.speculation.draft_seconds


def difference(now: SpeculationCounts, before: SpeculationCounts) -> SpeculationCounts:
    """What was counted in between."""

    def each(new: Sequence[int], old: Sequence[int]) -> list[int]:
        return [a - b for a, b in itertools.zip_longest(new, old, fillvalue=0)]

    return SpeculationCounts(
        drafts=now.drafts - before.drafts,
        draft_tokens=now.draft_tokens - before.draft_tokens,
        accepted_tokens=now.accepted_tokens - before.accepted_tokens,
        accepted_per_position=each(now.accepted_per_position, before.accepted_per_position),
        lengths=each(now.lengths, before.lengths),
        draft_seconds=now.draft_seconds - before.draft_seconds,
        step_seconds=now.step_seconds - before.step_seconds,
    )
