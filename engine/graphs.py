"""Decode steps as CUDA graphs: a step's hundreds of launches cost the host one.

A step is taken in which all sequences bring equally many rows: one token each, or one and as many draft tokens to be
verified. A graph is captured for each of at most 16 batch sizes per number of rows, when a batch first needs it; a
smaller batch is padded to the next size. Steps with trees of draft tokens have graphs of their own, in which attention
reads masks. Padding is harmless by construction: its rows are tokens of a slot of their own (`KVCache.padded_table`),
which has no entries, writes into a page that is nobody's, and sees only what it wrote there. Inside a graph nothing
depends on a length: kernels read the tables of all slots in place and the kept lengths on the device, and heads are
split into as many parts as the longest sequence there may be asks for (parts past a head's end have nothing to do).
"""

import logging
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

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
from .trees import TreeRows

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
    """One captured batch size and number of rows, T rows in all."""

    inputs: Tensor
    """[6, T] int64, read by every replay: token ids, positions, lengths, slots, rotations (see `StepInputs`), masks."""
    replay: Callable[[], None]


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """A replayed step of S sequences with n rows each, all tensors good until the next one."""

    logits: Tensor
    """[S * n, V] float32: of all rows."""
    slots: Tensor
    """[S] int64."""
    new_entries: Tensor
    """[S] int32: entries that each sequence gets and keeps; with drafts none yet."""
    host_slots: IntArray
    host_lengths: tuple[int, ...]
    """The same as `new_entries`."""


class DecodeGraphs:
    """Runs steps in which every sequence brings equally many rows and samples after each of them."""

    def __init__(
        self,
        runner: ModelRunner,
        cache: KVCache,
        sizes: tuple[int, ...],
        backend: Backend,
        capture: Capture,
        most_drafts: int = 0,
    ) -> None:
        """most_drafts: draft tokens that a sequence may bring along."""
        self._runner = runner
        self._cache = cache
        self._sizes = sizes
        self._backend = backend
        self._capture = capture
        self._graphs: dict[tuple[int, int, bool], _Graph] = {}
        """By sequences, rows of each, and whether these may be of trees."""
        most_rows = max(sizes[-1], min(sizes[-1] * (1 + most_drafts), SIZES[-1]))
        self._logits = torch.empty(most_rows, runner.spec.vocab_size, device=cache.device)
        """[most rows, V] float32, written by every graph: the logits of each in its own would be many times as large
        as all else they hold."""
        self._new_entries = torch.arange(2, dtype=torch.int32, device=cache.device)[:, None].repeat(1, sizes[-1])
        """[2, largest size]: none each, one each."""

    def takes(self, plan: BatchPlan) -> bool:
        """Whether a graph can compute the plan, whose drafts are proposed: the last `drafts` of the `token_ids`."""
        rows = _rows_each(plan)
        return rows > 0 and self._size(len(plan.decodes) + len(plan.sequences), rows) is not None

    def _size(self, count: int, rows: int) -> int | None:
        """The batch size to pad `count` sequences of so many rows to, if there is one."""
        index = bisect_left(self._sizes, count)
        fits = index < len(self._sizes) and self._sizes[index] * rows <= len(self._logits)
        return self._sizes[index] if fits else None

    def run(self, plan: BatchPlan, max_lengths: np.ndarray, newest: Tensor) -> DecodeStep | None:
        """Replay the step (capturing first, if its shape is new); None, with one warning, where capturing fails.

        max_lengths, newest: as `build_inputs` takes them.
        """
        decodes, others = plan.decodes, plan.sequences
        slots = np.array([*decodes.slots, *(sequence.slot for sequence in others)], np.int32)
        count, rows = len(slots), _rows_each(plan)
        size, end = self._size(count, rows), count * rows
        trees = TreeRows.of(plan, np.arange(0, end, rows), end)
        shape = size or 0, rows, trees is not None
        graph = None if size is None else self._graphs.get(shape) or self._captured(*shape)
        if size is None or graph is None:
            return None
        numbers = self._padding(size, rows)
        starts = np.array([*decodes.starts, *(sequence.start for sequence in others)])
        numbers[0, :end] = [*decodes.token_ids, *chain.from_iterable(sequence.token_ids for sequence in others)]
        numbers[1, :end] = (starts[:, None] + np.arange(rows)).ravel()
        numbers[4, :end] = (self._cache.rotary_starts(slots, starts)[:, None] + np.arange(rows)).ravel()
        numbers[2, :end] = max_lengths[slots].repeat(rows)
        numbers[3, :end] = slots.repeat(rows)
        if trees is not None:
            numbers[[1, 4], :end] += trees.shifts
            numbers[5, :end] = trees.visible
        graph.inputs.copy_(upload(numbers, self._cache.device))
        fill_unknown(graph.inputs[0, : len(decodes)], graph.inputs[3, : len(decodes)], decodes, newest)
        graph.replay()
        # Which draft tokens were right, and so what is kept, is known only later.
        kept = int(rows == 1)
        new = self._new_entries[kept, :count]
        return DecodeStep(self._logits[:end], graph.inputs[3, :end:rows], new, slots, (kept,) * count)

    def _padding(self, size: int, rows: int) -> np.ndarray:
        """Inputs of a step of nothing but padding: token 0 at the first positions of the slot behind all others."""
        numbers = np.zeros((6, size * rows), np.int64)
        numbers[1] = numbers[4] = np.tile(np.arange(rows), size)
        numbers[2], numbers[3] = rows, len(self._cache.page_table)
        return numbers

    def _captured(self, size: int, rows: int, trees: bool) -> _Graph | None:
        inputs = upload(self._padding(size, rows), self._cache.device)
        total = size * rows
        logit_rows = torch.arange(total, device=self._cache.device)
        starts = torch.arange(0, total + 1, rows, device=self._cache.device, dtype=torch.int32)

        def work() -> None:
            ids, positions, lengths, slots, rotations, masks = inputs
            context = self._context(positions, slots[::rows].contiguous(), starts, rows)
            context.visible = masks if trees else None
            self._logits[:total].copy_(self._runner.forward(ids, rotations, lengths, context, logit_rows))

        try:
            graph = _Graph(inputs, self._capture(work))
        except RuntimeError as error:  # out of memory, or something in the step that no graph can hold
            log.warning("decode steps run without CUDA graphs: %s", str(error).strip().splitlines()[0])
            self._sizes = ()
            return None
        self._graphs[size, rows, trees] = graph
        return graph

    def _context(self, positions: Tensor, slots: Tensor, starts: Tensor, rows: int) -> AttentionContext:
        """So many rows of each of `slots` [S]; made inside the graph, so that it reads the tables as they then are."""
        cache = self._cache
        table, kept = cache.padded_table, cache.padded_kept
        return AttentionContext(
            pool=cache.pool,
            entry_positions=cache.entry_positions,
            page_table=table,
            kept=kept,
            query_start=starts,
            query_lengths=(rows,) * len(slots),
            positions=positions,
            destinations=decode_destinations(table, kept, slots, rows=rows, page_size=cache.layout.page_size),
            max_kept=cache.layout.max_model_len,
            table_rows=slots,
            backend=self._backend,
        )


def _rows_each(plan: BatchPlan) -> int:
    """How many rows every sequence of the plan brings, if all of them are sampled; else 0."""
    rows = 1 if len(plan.decodes) or not plan.sequences else len(plan.sequences[0].token_ids)
    uniform = all(
        part.sample and not part.score_ids and len(part.token_ids) == rows == part.drafts + 1 for part in plan.sequences
    )
    return rows if uniform else 0
