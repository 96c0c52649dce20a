"""Decode steps as CUDA graphs: a step's hundreds of launches cost the host one.

A graph is captured for each of at most 16 batch sizes, when a batch first needs it; a smaller batch is padded to the
next size. Padding is harmless by construction: its rows are tokens of a slot of their own (`KVCache.padded_table`),
which has no entries, writes into a page that is nobody's, and sees only what it wrote there. Inside a graph nothing
depends on a length: kernels read the tables of all slots in place and the kept lengths on the device, and heads are
split into as many parts as the longest sequence there may be asks for (parts past a head's end have nothing to do).
"""

import logging
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core.plan import BatchPlan, IntArray
from ..kernels.backend import Backend
from ..kernels.cache import decode_destinations
from ..models.context import AttentionContext
from ..models.runner import ModelRunner
from .cache import KVCache
from .inputs import fill_unknown
from .staging import upload

log = logging.getLogger("quire")

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
"""Batch sizes worth a graph: padding adds at most half to a small batch and a sixth to a large one, and beyond 256 a
step keeps the device busy long enough to hide its launches."""

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes work that reads and writes fixed tensors, returns what does it again; may run it."""


def graph_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """The batch sizes that graphs are captured for, ascending, at most 16."""
    largest = min(max_num_seqs, SIZES[-1])
    return (*(size for size in SIZES if size < largest), largest)


class CudaCapture:
    """Captures graphs that share one pool of memory: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `Capture`; the first, plain run compiles kernels and lets libraries set themselves up."""
        work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        return graph.replay


@dataclass(frozen=True, slots=True)
class _Graph:
    """One captured batch size n."""

    inputs: Tensor
    """[4, n] int64, read by every replay: token ids, positions, lengths, slots."""
    replay: Callable[[], None]


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """A replayed step of S sequences, all tensors good until the next one."""

    logits: Tensor
    """[S, V] float32."""
    slots: Tensor
    """[S] int64."""
    new_entries: Tensor
    """[S] int32: ones."""
    host_slots: IntArray


class DecodeGraphs:
    """Runs steps in which every sequence brings one token and samples the next."""

    def __init__(
        self, runner: ModelRunner, cache: KVCache, sizes: tuple[int, ...], backend: Backend, capture: Capture
    ) -> None:
        self._runner = runner
        self._cache = cache
        self._sizes = sizes
        self._backend = backend
        self._capture = capture
        self._graphs: dict[int, _Graph] = {}
        self._logits = torch.empty(sizes[-1], runner.spec.vocab_size, device=cache.device)
        """[largest size, V] float32, written by every graph: the logits of each in its own would be many times as
        large as all else they hold."""
        self._ones = torch.ones(sizes[-1], dtype=torch.int32, device=cache.device)

    def takes(self, plan: BatchPlan) -> bool:
        """Whether the plan is a pure decode step that some graph is large enough for."""
        return plan.num_tokens <= (self._sizes[-1] if self._sizes else 0) and all(
            len(sequence.token_ids) == 1 and sequence.sample and not sequence.score_ids for sequence in plan.sequences
        )

    def run(self, plan: BatchPlan, max_lengths: np.ndarray, newest: Tensor) -> DecodeStep | None:
        """Replay the step (capturing first, if its size is new); None, with one warning, where capturing fails.

        max_lengths, newest: as `build_inputs` takes them.
        """
        count = plan.num_tokens
        size = self._sizes[bisect_left(self._sizes, count)]
        graph = self._graphs.get(size) or self._captured(size)
        if graph is None:
            return None
        decodes, others = plan.decodes, plan.sequences
        numbers = self._padding(size)
        numbers[0, :count] = [*decodes.token_ids, *(sequence.token_ids[0] for sequence in others)]
        numbers[1, :count] = [*decodes.starts, *(sequence.start for sequence in others)]
        numbers[3, :count] = slots = np.array([*decodes.slots, *(sequence.slot for sequence in others)], np.int32)
        numbers[2, :count] = max_lengths[slots]
        graph.inputs.copy_(upload(numbers, self._cache.device))
        fill_unknown(graph.inputs[0, : len(decodes)], graph.inputs[3, : len(decodes)], decodes, newest)
        graph.replay()
        return DecodeStep(self._logits[:count], graph.inputs[3, :count], self._ones[:count], slots)

    def _padding(self, size: int) -> np.ndarray:
        """Inputs of a step that is nothing but padding: token 0 at position 0 of the slot behind all others."""
        numbers = np.zeros((4, size), np.int64)
        numbers[2], numbers[3] = 1, len(self._cache.page_table)
        return numbers

    def _captured(self, size: int) -> _Graph | None:
        inputs = upload(self._padding(size), self._cache.device)
        rows = torch.arange(size + 1, device=self._cache.device)
        starts = rows.int()

        def work() -> None:
            ids, positions, lengths, slots = inputs
            context = self._context(positions, slots, starts)
            self._logits[:size].copy_(self._runner.forward(ids, positions, lengths, context, rows[:-1]))

        try:
            graph = _Graph(inputs, self._capture(work))
        except RuntimeError as error:  # out of memory, or something in the step that no graph can hold
            log.warning("decode steps run without CUDA graphs: %s", str(error).strip().splitlines()[0])
            self._sizes = ()
            return None
        self._graphs[size] = graph
        return graph

    def _context(self, positions: Tensor, slots: Tensor, starts: Tensor) -> AttentionContext:
        """One token of each of `slots` [n]; made inside the graph, so that it reads the tables as they then are."""
        cache = self._cache
        page_size = cache.layout.page_size
        return AttentionContext(
            pool=cache.pool,
            entry_positions=cache.entry_positions,
            page_table=cache.padded_table,
            kept=cache.padded_kept,
            query_start=starts,
            query_lengths=(1,) * len(slots),
            positions=positions,
            destinations=decode_destinations(cache.padded_table, cache.padded_kept, slots, page_size=page_size),
            max_kept=cache.layout.max_model_len,
            table_rows=slots,
            backend=self._backend,
        )
