"""Decode steps as CUDA graphs: a step's hundreds of launches cost the host one.

A step is taken in which every sequence brings its newest tokens, mostly one, and after them as many draft tokens to be
verified as it likes. Its rows stand one behind another, padded to the next of at most 16 sizes; a graph is captured for
a size when a step first needs it: one for steps of one row each, one for others, and one for steps with trees of draft
tokens, in which attention reads masks. Padding is harmless by construction: its rows are tokens of a slot of their own
(`KVCache.padded_table`), each a sequence by itself, which has no entries, writes into a page that is nobody's, and
sees only what it wrote there. Inside a graph nothing depends on a length: which rows are whose is read on the device,
kernels read the tables of all slots in place and the kept lengths on the device, and heads are split into as many parts
as the longest sequence there may be asks for (parts past a head's end have nothing to do).
"""

import logging
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..core.ids import SlotId
from ..core.plan import MAX_FORCED_TOKENS, BatchPlan, IntArray, SequencePlan
from ..kernels.backend import Backend
from ..kernels.cache import row_destinations
from ..models.context import AttentionContext
from ..models.runner import ModelRunner
from .cache import KVCache
from .inputs import fill_unknown
from .staging import upload
from .trees import TreeRows

log = logging.getLogger("quire")

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
"""Rows worth a graph: padding adds at most half to a small step and a sixth to a large one, and beyond 256 a step keeps
the device busy long enough to hide its launches."""
_IDS, _POSITIONS, _LENGTHS, _SLOTS, _ROTATIONS, _MASKS, _ORDERS, _OWNERS, _STARTS = range(9)
"""Lines of a graph's input. By row: see `StepInputs`, masks, and which of its sequence's rows it is. By sequence: slot,
and first row (with the end of the last behind them)."""
_AGREEMENT = 0.05
"""How far a replay may be from the step itself, as a share of the largest logit: libraries may add in other orders."""

Kind = Literal["decodes", "drafts", "trees"]
Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes work that reads and writes fixed tensors, returns what does it again; may run it."""


def graph_sizes(most_rows: int) -> tuple[int, ...]:
    """The numbers of rows that graphs are captured for, ascending, at most 16."""
    largest = min(most_rows, SIZES[-1])
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
        # What other threads do meanwhile is no part of it, and must not make it fail.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        return graph.replay


@dataclass(frozen=True, slots=True)
class _Graph:
    """One captured number of rows."""

    inputs: Tensor
    """[9, W] int64, read by every replay."""
    replay: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Rows:
    """A step on the host: T rows of S sequences."""

    slots: IntArray
    """[S]"""
    counts: npt.NDArray[np.int64]
    """[S]: rows of each sequence."""
    kept: IntArray
    """[S]: entries that each gets and keeps; with drafts none yet."""

    @staticmethod
    def of(plan: BatchPlan) -> "_Rows":
        """The plan's decodes come first."""
        decodes, others = len(plan.decodes), plan.sequences
        slots = np.concatenate([plan.decodes.slots, np.array([part.slot for part in others], np.int32)])
        counts, kept = np.ones(len(slots), np.int64), np.ones(len(slots), np.int32)
        counts[decodes:] = [len(part.token_ids) for part in others]
        kept[decodes:] = [0 if part.drafts else len(part.token_ids) for part in others]
        return _Rows(slots, counts, kept)


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """A replayed step of S sequences, all tensors good until the next one."""

    logits: Tensor
    """[T, V] float32: of all rows."""
    slots: Tensor
    """[S] int64."""
    new_entries: Tensor
    """[S] int32: entries that each sequence gets and keeps; with drafts none yet."""
    host_slots: IntArray
    host_lengths: tuple[int, ...]
    """The same as `new_entries`."""


class DecodeGraphs:
    """Runs steps in which every sequence samples after each of its rows."""

    def __init__(
        self,
        runner: ModelRunner,
        cache: KVCache,
        max_num_seqs: int,
        backend: Backend,
        capture: Capture,
        most_drafts: int = 0,
        binds: Callable[[SlotId], bool] = lambda slot: False,
    ) -> None:
        """most_drafts: draft tokens that a sequence may bring along; binds: whether a slot's has a grammar."""
        self._binds = binds
        self._runner = runner
        self._cache = cache
        self._sizes = graph_sizes(max_num_seqs * (1 + most_drafts))
        self._backend = backend
        self._capture = capture
        self._graphs: dict[tuple[int, Kind], _Graph] = {}
        """By padded rows, and whose they are."""
        self._logits = torch.empty(self._sizes[-1], runner.spec.vocab_size, device=cache.device)
        """[most rows, V] float32, written by every graph: the logits of each in its own would be many times as large
        as all else they hold."""
        self._new_entries = torch.arange(2, dtype=torch.int32, device=cache.device)[:, None].repeat(1, self._sizes[-1])
        """[2, most rows]: none each, one each."""

    def takes(self, plan: BatchPlan) -> bool:
        """Whether a graph can compute the plan, whose drafts are proposed: the last `drafts` of the `token_ids`."""
        sampled = all(
            part.sample and not part.score_ids and not part.scratch and self._are_newest(part)
            for part in plan.sequences
        )
        return sampled and 0 < plan.num_tokens <= max(self._sizes, default=0)

    def _are_newest(self, part: SequencePlan) -> bool:
        """Whether the tokens, drafts apart, are one, or one and what may be forced; a prompt is no such step's."""
        forced = len(part.token_ids) - part.drafts - 1
        return forced == 0 or (0 < forced <= MAX_FORCED_TOKENS and self._binds(part.slot))

    def run(self, plan: BatchPlan, max_lengths: np.ndarray, newest: Tensor) -> DecodeStep | None:
        """Replay the step (capturing first, if its shape is new); None, with one warning, where capturing fails.

        max_lengths, newest: as `build_inputs` takes them.
        """
        rows, decodes = _Rows.of(plan), plan.decodes
        sequences, total = len(rows.slots), int(rows.counts.sum())
        trees = TreeRows.of(plan, rows.counts.cumsum() - rows.counts, total)
        kind: Kind = "trees" if trees is not None else "drafts" if total > sequences else "decodes"
        size = self._sizes[bisect_left(self._sizes, total)]
        graph = self._graphs.get((size, kind)) or self._captured(size, kind)
        if graph is None:
            return None
        numbers = self._numbers(plan, rows, max_lengths, size)
        if trees is not None:
            numbers[[_POSITIONS, _ROTATIONS], :total] += trees.shifts
            numbers[_MASKS, :total] = trees.visible
        graph.inputs.copy_(upload(numbers, self._cache.device))
        known = slice(len(decodes))
        fill_unknown(graph.inputs[_IDS, known], graph.inputs[_SLOTS, known], decodes, newest)
        graph.replay()
        # Which draft tokens were right, and so what is kept, is known only later.
        alike = rows.kept[0] < len(self._new_entries) and (rows.kept == rows.kept[0]).all()
        new = self._new_entries[int(rows.kept[0]), :sequences] if alike else upload(rows.kept, self._cache.device)
        slots = graph.inputs[_OWNERS, :sequences]
        return DecodeStep(self._logits[:total], slots, new, rows.slots, tuple(rows.kept.tolist()))

    def _numbers(self, plan: BatchPlan, rows: _Rows, max_lengths: np.ndarray, size: int) -> np.ndarray:
        """The input of a step of chains."""
        decodes, others, slots, counts = plan.decodes, plan.sequences, rows.slots, rows.counts
        sequences, ends = len(slots), counts.cumsum()
        firsts, total = ends - counts, int(ends[-1])
        numbers = self._padding(size)
        orders = np.arange(total) - firsts.repeat(counts)
        starts = np.concatenate([decodes.starts, np.array([part.start for part in others], np.int32)])
        numbers[_IDS, : len(decodes)] = decodes.token_ids
        numbers[_IDS, len(decodes) : total] = [*chain.from_iterable(part.token_ids for part in others)]
        numbers[_POSITIONS, :total] = starts.repeat(counts) + orders
        numbers[_LENGTHS, :total] = max_lengths[slots].repeat(counts)
        numbers[_SLOTS, :total] = slots.repeat(counts)
        numbers[_ROTATIONS, :total] = self._cache.rotary_starts(slots, starts).repeat(counts) + orders
        numbers[_ORDERS, :total] = orders
        numbers[_OWNERS, :sequences] = slots
        numbers[_STARTS, :sequences] = firsts
        # A padding row is a sequence; those that are left have no rows.
        numbers[_STARTS, sequences : size + 1] = np.minimum(total + np.arange(size + 1 - sequences), size)
        return numbers

    def _padding(self, size: int) -> np.ndarray:
        """The input of a step of nothing but padding: first tokens of the slot behind all others."""
        # An even width: each line begins at a multiple of 16 bytes, as kernels like it best.
        numbers = np.zeros((9, size + 2 - size % 2), np.int64)
        numbers[_LENGTHS] = 1
        numbers[[_SLOTS, _OWNERS]] = len(self._cache.page_table)
        numbers[_STARTS, : size + 1] = np.arange(size + 1)
        return numbers

    def _captured(self, size: int, kind: Kind) -> _Graph | None:
        inputs = upload(self._padding(size), self._cache.device)
        logits, logit_rows = self._logits[:size], torch.arange(size, device=self._cache.device)

        def work() -> None:
            ids, _, lengths, _, rotations, *_ = inputs[:, :size]
            context = self._context(inputs, size, kind)
            logits.copy_(self._runner.forward(ids, rotations, lengths, context, logit_rows))

        try:
            graph = _Graph(inputs, self._capture(work))
            work()
            expected = logits.clone()
            logits.zero_()
            graph.replay()
            if not torch.allclose(logits, expected, rtol=0, atol=_AGREEMENT * float(expected.abs().max())):
                raise RuntimeError("a replay does not give the logits of the step it was captured from")
        # Out of memory, something in the step that no graph can hold, or a kernel that does not compile.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.warning("decode steps run without CUDA graphs: %s", reason)
            self._sizes = ()
            return None
        self._graphs[size, kind] = graph
        return graph

    def _context(self, inputs: Tensor, size: int, kind: Kind) -> AttentionContext:
        """Made inside the graph, so that it reads the tables as they then are."""
        cache, rows = self._cache, inputs[:, :size]
        table, kept = cache.padded_table, cache.padded_kept
        page_size = cache.layout.page_size
        return AttentionContext(
            pool=cache.pool,
            entry_positions=cache.entry_positions,
            page_table=table,
            kept=kept,
            query_start=inputs[_STARTS, : size + 1].int(),
            query_lengths=(1,) * size if kind == "decodes" else None,
            positions=rows[_POSITIONS],
            destinations=row_destinations(table, kept, rows[_SLOTS], rows[_ORDERS], page_size=page_size),
            max_kept=cache.layout.max_model_len,
            table_rows=rows[_OWNERS],
            visible=rows[_MASKS] if kind == "trees" else None,
            backend=self._backend,
        )
