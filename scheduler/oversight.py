"""`Oversight`: which requests must be ended although they did nothing wrong: the late ones and the stuck ones."""

import logging
from collections import Counter
from collections.abc import Iterator

from ..core.errors import GenerationError, QuireError
from ..core.ids import RequestId
from .deadlines import Deadlines, late
from .sequence import SequenceState
from .watchdog import Watchdog

log = logging.getLogger("quire.scheduler")


class Oversight:
    """Deadlines and watchdog of all unfinished requests, and counts of what came of them."""

    def __init__(self, queue_timeout: float | None) -> None:
        """queue_timeout: seconds in which a request must start; None: no limit."""
        self._queue_timeout = queue_timeout
        self._deadlines = Deadlines()
        self.watchdog = Watchdog()
        self.timeouts: Counter[str] = Counter()
        """Requests found late, by deadline: `queue` or `request`."""
        self.stuck: Counter[str] = Counter()
        """Requests found stuck, by reason."""

    def arrived(self, choices: list[SequenceState], now: float) -> None:
        """A request came at clock time `now` (seconds)."""
        request = choices[0].request
        if request.timeout is not None:
            self._deadlines.set(request.id, "request", now + request.timeout)
        if self._queue_timeout is not None:
            self._deadlines.set(request.id, "queue", now + self._queue_timeout)
        for sequence in choices:
            self.watchdog.arrived(sequence)

    def started(self, sequence: SequenceState) -> None:
        """A sequence got its first slot; with the first one its request has left the queue."""
        self._deadlines.drop(sequence.request.id, "queue")
        self.watchdog.started(sequence)

    def ended(self, request_id: RequestId) -> None:
        """Nothing more is expected of the request."""
        self._deadlines.drop(request_id, "queue", "request")

    def due(self, now: float, requests: dict[RequestId, list[SequenceState]]) -> Iterator[tuple[RequestId, QuireError]]:
        """Who must be ended at clock time `now`, and with which error; `requests`: unfinished choices of each."""
        for request_id, kind in self._deadlines.passed(now):
            choices = requests[request_id]
            limit = choices[0].request.timeout if kind == "request" else self._queue_timeout
            assert limit is not None
            self.timeouts[kind] += 1
            yield request_id, late(kind, limit, choices)
        for verdict in self.watchdog.verdicts():
            if not verdict.sequence.done:
                request_id = verdict.sequence.request.id
                log.error("request %s is stuck (%s): %s; it is ended", request_id, verdict.reason, verdict.text)
                self.stuck[verdict.reason] += 1
                yield request_id, GenerationError(f"the scheduler is stuck: {verdict.text}")
