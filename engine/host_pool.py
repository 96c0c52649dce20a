"""`HostPool`: pages in host memory behind the KV pool, of the same shape. Which page is whose, others decide.

On a GPU the copies run on a stream of their own: the pages to leave are gathered into a buffer first, so that the
pool's pages are free at once, and the step waits only for what it brings back. Runs of neighbouring host pages travel
together.
"""

import time
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..core.plan import IntArray, PageCopies
from ..kernels.cache import zeros
from .cache import KVCache
from .staging import upload


class HostPool:
    """One host tensor [Ph, ...] per page tensor [P, ...] of the cache; pinned for a GPU, else mapped as it is used."""

    def __init__(self, cache: KVCache, num_pages: int) -> None:
        self.num_pages = num_pages
        self._cache = cache
        self._on_gpu = cache.device.type == "cuda"
        self.tensors = [self._allocate(tensor) for tensor in cache.page_tensors]
        self._stream = torch.cuda.Stream(cache.device) if self._on_gpu else None
        self._timings: deque[tuple[torch.cuda.Event, torch.cuda.Event, int]] = deque()
        """(begin, end, pages) of copies that may not be complete."""
        self._pages = 0
        self._seconds = 0.0

    def _allocate(self, like: Tensor) -> Tensor:
        shape = (self.num_pages, *like.shape[1:])
        if self._on_gpu:
            return torch.empty(shape, dtype=like.dtype, pin_memory=True)
        return zeros(shape, like.dtype, torch.device("cpu"))

    def copy_out(self, copies: PageCopies) -> None:
        """Device pages into host pages; the device pages may be overwritten by what follows on the current stream."""
        if not len(copies.host):
            return
        started = time.perf_counter()
        device = upload(copies.device, self._cache.device).long()
        leaving = [tensor.index_select(0, device) for tensor in self._cache.page_tensors]
        if self._stream is None:
            host = torch.from_numpy(copies.host).long()
            for tensor, pages in zip(self.tensors, leaving, strict=True):
                tensor.index_copy_(0, host, pages)
            self._note(len(host), time.perf_counter() - started)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._cache.device))
        with torch.cuda.stream(self._stream):
            begin = _event()
            for tensor, pages in zip(self.tensors, leaving, strict=True):
                for start, end, first in _runs(copies.host):
                    tensor[first : first + end - start].copy_(pages[start:end], non_blocking=True)
                pages.record_stream(self._stream)
            self._timings.append((begin, _event(), len(copies.host)))

    def copy_in(self, copies: PageCopies) -> None:
        """Host pages into device pages, before anything that follows on the current stream."""
        if not len(copies.host):
            return
        started = time.perf_counter()
        device = upload(copies.device, self._cache.device).long()
        if self._stream is None:
            host = torch.from_numpy(copies.host).long()
            for target, tensor in zip(self._cache.page_tensors, self.tensors, strict=True):
                target.index_copy_(0, device, tensor.index_select(0, host))
            self._note(len(host), time.perf_counter() - started)
            return
        current = torch.cuda.current_stream(self._cache.device)
        with torch.cuda.stream(self._stream):
            begin = _event()
            coming = [self._gather(tensor, copies.host) for tensor in self.tensors]
            self._timings.append((begin, _event(), len(copies.host)))
        current.wait_stream(self._stream)
        for target, pages in zip(self._cache.page_tensors, coming, strict=True):
            pages.record_stream(current)
            target.index_copy_(0, device, pages)

    def _gather(self, tensor: Tensor, host: IntArray) -> Tensor:
        """The host pages in a buffer on the device."""
        pages = torch.empty((len(host), *tensor.shape[1:]), dtype=tensor.dtype, device=self._cache.device)
        for start, end, first in _runs(host):
            pages[start:end].copy_(tensor[first : first + end - start], non_blocking=True)
        return pages

    def timing(self) -> tuple[int, float]:
        """(pages, seconds) of the copies that were completed since the last call; never waits."""
        while self._timings and self._timings[0][1].query():
            begin, end, pages = self._timings.popleft()
            self._note(pages, begin.elapsed_time(end) / 1e3)
        done = self._pages, self._seconds
        self._pages, self._seconds = 0, 0.0
        return done

    def settle(self) -> None:
        """Wait until the host pages hold what was copied to them."""
        if self._stream is not None:
            self._stream.synchronize()

    def _note(self, pages: int, seconds: float) -> None:
        self._pages += pages
        self._seconds += seconds


def _runs(pages: IntArray) -> Sequence[tuple[int, int, int]]:
    """(start, end, first page) of the stretches of `pages` that count up by one."""
    starts = np.flatnonzero(np.diff(pages, prepend=pages[0] - 2) != 1)
    ends = np.append(starts[1:], len(pages))
    return [(int(start), int(end), int(pages[start])) for start, end in zip(starts, ends, strict=True)]


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
