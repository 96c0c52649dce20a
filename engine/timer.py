"""How long a step's forward pass and sampling took, measured without making the host wait for the device."""

import time

import torch

Moment = float | torch.cuda.Event


class StepTimer:
    """On a CPU the clock; on a GPU events, read once the step has fetched its tokens.

    A GPU step that fetches nothing (a chunk inside a prompt) may still be running when it is asked for: its times are
    then counted with the next step that fetches.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._late: list[tuple[Moment, Moment, Moment]] = []

    def now(self) -> Moment:
        """The moment at which what is queued so far has been computed."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, started: Moment, computed: Moment, sampled: Moment) -> tuple[float, float]:
        """(forward, sampling) of the step that ends now, and of steps that had not ended when they were asked for."""
        if not self._cuda:
            return _between(started, computed), _between(computed, sampled)
        steps = [*self._late, (started, computed, sampled)]
        self._late = []
        ended: list[tuple[Moment, Moment, Moment]] = []
        for step in steps:
            (ended if _passed(step[-1]) else self._late).append(step)
        return sum(_between(a, b) for a, b, _ in ended), sum(_between(b, c) for _, b, c in ended)


def _passed(moment: Moment) -> bool:
    return isinstance(moment, float) or moment.query()


def _between(first: Moment, second: Moment) -> float:
    """Seconds."""
    if isinstance(first, float) or isinstance(second, float):
        assert isinstance(first, float) and isinstance(second, float)
        return second - first
    return first.elapsed_time(second) / 1000
