"""How long a step's forward pass and sampling took, measured without making the host wait for the device."""

import time

import torch


class StepTimer:
    """On a CPU the clock; on a GPU events, read once the step has fetched its tokens.

    A GPU step that fetches nothing (a chunk inside a prompt) may still be running when it is asked for: its forward
    time is then counted with the next step that fetches.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._started = self._computed = 0.0

    def start(self) -> None:
        """The forward pass begins."""
        self._started = time.perf_counter()
        if self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            self._pending.append((begin, end))

    def computed(self) -> None:
        """The forward pass is queued (on a CPU: done), sampling begins."""
        self._computed = time.perf_counter()
        if self._cuda:
            self._pending[-1][1].record()

    def seconds(self) -> tuple[float, float]:
        """(forward, sampling) of the step that ends now."""
        ended = time.perf_counter()
        if not self._cuda:
            return self._computed - self._started, ended - self._computed
        passed = [pair for pair in self._pending if pair[1].query()]
        self._pending = self._pending[len(passed) :]
        forward = sum(begin.elapsed_time(end) for begin, end in passed) / 1000
        return forward, max(0.0, ended - self._started - forward)
