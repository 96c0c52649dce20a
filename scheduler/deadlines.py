"""`Deadlines`: by when requests must have started, and by when ended."""

from collections.abc import Iterator

from ..core.errors import RequestTimeoutError
from ..core.ids import RequestId
from ..core.messages import DEADLINES, Deadline
from .heap import RemovalHeap
from .sequence import SequenceState


class Deadlines:
    """Clock times of the scheduler's clock, the next one first."""

    def __init__(self) -> None:
        self._due: dict[Deadline, RemovalHeap[str, RequestId]] = {kind: RemovalHeap() for kind in DEADLINES}

    def set(self, request_id: RequestId, kind: Deadline, at: float) -> None:
        """The request is late once the clock shows `at` (seconds)."""
        self._due[kind].push(request_id, at, request_id)

    def drop(self, request_id: RequestId, *kinds: Deadline) -> None:
        """What was awaited has happened; fine if there was no such deadline."""
        for kind in kinds:
            if self._due[kind]:
                self._due[kind].remove(request_id)

    def passed(self, now: float) -> Iterator[tuple[RequestId, Deadline]]:
        """Who is late at clock time `now`; each is told once."""
        for kind, due in self._due.items():
            while (first := due.first()) is not None and first[0] <= now:
                due.remove(first[1])
                yield first[2], kind


def late(kind: Deadline, limit: float, choices: list[SequenceState]) -> RequestTimeoutError:
    """The error of a request that passed a deadline `limit` seconds after its arrival; `choices`: its unfinished."""
    if kind == "queue":
        return RequestTimeoutError(f"the request waited {limit:g} s in the queue without a start")
    generated = max(choice.num_generated for choice in choices)
    if all(choice.started_at is None for choice in choices):
        state = "it was still waiting"
    elif not generated:
        state = "its prompt was being computed"
    else:
        state = f"{generated:,} tokens were generated"
    return RequestTimeoutError(f"the request did not end within its timeout of {limit:g} s: {state}", param="timeout")
