"""Times of GPU work, and the ceilings they are held against: measured copy bandwidth and matrix product rate."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

_FLUSH_BYTES = 256 << 20
"""Written before each timed run: more than any L2 holds, so that every run starts from device memory."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result."""

    section: str
    case: str
    contender: str
    microseconds: float | None
    """None: it could not run, `note` says why."""
    roofline: float | None = None
    """Share of the time that the measured ceilings would allow at best (1 is perfect)."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Work:
    """What a kernel must at least do."""

    num_bytes: float
    """Read from and written to device memory."""
    flops: float = 0.0


class Meter:
    """Times callables on one device; on a CPU (where the script itself is exercised) a single run of each."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device = device
        self.repeats = repeats

    @cached_property
    def bandwidth(self) -> float:
        """Bytes per second of a large copy, reads and writes counted."""
        size = (2 << 30) if self.device.type == "cuda" else (1 << 20)
        source = torch.empty(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / self.seconds(lambda: target.copy_(source))

    @cached_property
    def flops(self) -> float:
        """Operations per second of a large bfloat16 matrix product on random data."""
        size = 8192 if self.device.type == "cuda" else 128
        a, b = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        return 2 * size**3 / self.seconds(lambda: a @ b)

    def floor(self, work: Work) -> float:
        """Seconds that the work takes at the measured ceilings."""
        return max(work.num_bytes / self.bandwidth, work.flops / self.flops)

    def seconds(self, run: Callable[[], object]) -> float:
        """Median seconds of a run from cold caches: replays of a CUDA graph, so that no launch is waited for."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            run()
            return time.perf_counter() - started
        replay = _captured(run)
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=self.device)
        times = []
        for _ in range(self.repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            start.record()
            replay()
            end.record()
            times.append((start, end))
        torch.cuda.synchronize()
        measured = sorted(start.elapsed_time(end) for start, end in times)
        return measured[len(measured) // 2] / 1000

    def row(self, section: str, case: str, contender: str, run: Callable[[], object], work: Work) -> Row:
        """Time a run and set it beside its floor; what other people's kernels raise becomes a note."""
        try:
            seconds = self.seconds(run)
        except Exception as error:  # a contender that cannot run must not end the whole benchmark
            torch.cuda.empty_cache()
            return Row(section, case, contender, None, note=f"{type(error).__name__}: {str(error)[:120]}")
        return Row(section, case, contender, seconds * 1e6, self.floor(work) / seconds)


def _captured(run: Callable[[], object]) -> Callable[[], object]:
    """A function that replays the run as a CUDA graph; warmed up (and compiled) before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
