"""Sequences that forget nothing, but whose new rows read only pages that a selector picks (`pruning.selector`)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.ids import SlotId
from ..core.model_spec import ModelSpec
from ..core.plan import BatchPlan, SlotAssignment
from ..core.pruning import PruneParams
from ..kernels.backend import TRITON_BACKENDS, Backend
from ..kernels.page_bounds_reference import page_key_bounds
from ..models.context import AttentionContext, SelectedPages
from ..pruning.selector import PageView, Selector, select_pages
from ..pruning.table import make_selector
from .cache import KVCache
from .staging import upload


class PageSelection:
    """The slots that select, and the bounds of their pages where a selector wants them."""

    def __init__(self, cache: KVCache, spec: ModelSpec, backend: Backend) -> None:
        self._cache = cache
        self._backend = backend
        self._layers = [layer for layer, window in enumerate(spec.windows) if window is None]
        self._choosers: dict[SlotId, tuple[PruneParams, Selector]] = {}
        self._known: dict[SlotId, int] = {}
        """Tokens that the sequence entered with: their rows read all."""
        self._bounded: dict[SlotId, int] = {}
        """Leading pages of each head of the slot whose bounds are known."""
        self._bounds: Tensor | None = None
        """[P, 2, D]; made when first needed."""

    def assign(self, assignment: SlotAssignment) -> None:
        """A sequence enters the slot."""
        self._choosers.pop(assignment.slot, None)
        prune = assignment.prune
        if prune is None or not prune.forgets:
            return
        selector = make_selector(prune)
        if selector is not None and any(layer >= selector.dense_layers for layer in self._layers):
            self._choosers[assignment.slot], self._bounded[assignment.slot] = (prune, selector), 0
            self._known[assignment.slot] = len(assignment.prompt_ids) + len(assignment.output_ids)

    def park(self, slot: SlotId) -> object:
        """See `SlotKeeper.park`. Bounds belong to pages, so they are found anew."""
        return self._known.get(slot)

    def unpark(self, slot: SlotId, state: Any) -> None:
        """See `SlotKeeper.unpark`."""
        if slot in self._choosers:
            self._known[slot] = state

    def selects(self, slot: SlotId) -> bool:
        """Whether the slot's rows read pages of their own choice."""
        return slot in self._choosers

    @property
    def picks(self) -> bool:
        """Whether any slot's rows do."""
        return bool(self._choosers)

    def selector(self, plan: BatchPlan) -> "StepSelector | None":
        """Who picks pages in this step; None if everybody reads everything."""
        if not self._choosers:
            return None
        # What comes after what was known at first comes token by token, or as a token and proposals to follow it.
        rows: list[_Reading] = []
        pieces: list[_Piece] = []
        fresh: list[tuple[int, int, int]] = []
        row, size = 0, self._cache.layout.page_size
        for index, part in enumerate(plan.parts()):
            count = len(part.token_ids)
            dense, chooser = count, self._choosers.get(part.slot)
            if chooser is not None:
                dense = min(count, max(0, self._known[part.slot] - part.start))
            if dense:
                pieces.append(_Piece(index, 0, row, dense))
            if chooser is not None and dense < count:
                params, selector = chooser
                for ahead in range(dense, count):
                    budget = params.target(part.start + ahead + 1)
                    rows.append(_Reading(selector, len(pieces), row + ahead, budget))
                    pieces.append(_Piece(index, ahead, row + ahead, 1))
                filled = (part.start + count - 1) // size
                if selector.needs_bounds and filled > (full := self._bound(part.slot, selector)):
                    fresh.append((index, full, filled))
            row += count
        if not rows:
            return None
        split = None if len(pieces) == index + 1 else _Split.of(pieces, self._cache.device)
        return StepSelector(rows, frozenset(self._layers), self._bounds, self._find, split, fresh)

    def _bound(self, slot: SlotId, selector: Selector) -> int:
        """Find the bounds of the slot's pages that have become full; how many each head has of them."""
        cache, size = self._cache, self._cache.layout.page_size
        if self._bounds is None:
            self._bounds = cache.pool.new_zeros(len(cache.pool), 2, cache.layout.head_dim)
        full, first = int(cache.computed[slot]) // size, self._bounded[slot]
        if full > first:
            layers = [layer for layer in self._layers if layer >= selector.dense_layers]
            self._find(cache.page_table[slot, layers, :, first:full])
            self._bounded[slot] = full
        return full

    def _find(self, pages: Tensor) -> None:
        """Find the bounds of full pages, of any shape."""
        find = page_key_bounds
        if self._backend in TRITON_BACKENDS:
            from ..kernels.page_bounds_triton import page_key_bounds_triton as find  # triton is beside a GPU only
        assert self._bounds is not None
        pages = pages.flatten()
        find(self._bounds, self._cache.pool, pages, torch.full_like(pages, self._cache.layout.page_size))


@dataclass(frozen=True, slots=True)
class _Reading:
    """A row that reads some pages."""

    selector: Selector
    piece: int
    row: int
    """Of the batch."""
    budget: int
    """Entries to read."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive rows of a sequence that read the same pages."""

    sequence: int
    ahead: int
    """Rows of the sequence before these."""
    row: int
    """The first, of the batch."""
    count: int


@dataclass(frozen=True, slots=True)
class _Split:
    """The batch as attention is to see it: each of S' pieces as if it was a sequence of its own."""

    sequences: Tensor
    """[S'] int64"""
    ahead: Tensor
    """[S', 1] int64"""
    query_start: Tensor
    """[S' + 1] int32"""
    query_lengths: tuple[int, ...]

    @staticmethod
    def of(pieces: Sequence[_Piece], device: torch.device) -> "_Split":
        """A batch cut so."""
        end = pieces[-1].row + pieces[-1].count
        columns = [(piece.sequence, piece.ahead, piece.row) for piece in pieces] + [(0, 0, end)]
        sequences, ahead, rows = upload(np.array(columns, np.int64).T.copy(), device)
        lengths = tuple(piece.count for piece in pieces)
        return _Split(sequences[:-1], ahead[:-1, None], rows.int(), lengths)


class StepSelector:
    """Picks pages for one step; fulfils `models.context.PageSelector`."""

    def __init__(
        self,
        rows: Sequence[_Reading],
        layers: frozenset[int],
        bounds: Tensor | None,
        find: Callable[[Tensor], None],
        split: _Split | None,
        fresh: Sequence[tuple[int, int, int]],
    ) -> None:
        """bounds [P, 2, D], if anybody needs them, which `find` finds for given pages; split: None if every piece is a
        sequence; fresh: (sequence, first page, end) of what the step's own rows fill and later ones of them read.
        """
        self._rows = rows
        self._layers = layers
        self._bounds = bounds
        self._find = find
        self._split = split
        self._fresh = fresh

    def select(self, context: AttentionContext, layer: int, query: Tensor) -> SelectedPages | None:
        """See `PageSelector`."""
        readings = [reading for reading in self._rows if layer >= reading.selector.dense_layers]
        if layer not in self._layers or not readings:
            return None
        for sequence, first, end in self._fresh:
            self._find(context.page_table[sequence, layer, :, first:end])
        split = self._split
        if split is None:
            tables, kept = context.page_table[:, layer].clone(), context.kept[:, layer].clone()
            start, lengths = context.query_start, context.query_lengths
        else:
            tables = context.page_table[split.sequences, layer]
            kept = (context.kept[split.sequences, layer] + split.ahead).int()
            start, lengths = split.query_start, split.query_lengths
        keys = context.pool[:, 0]
        for reading in readings:
            part = slice(reading.piece, reading.piece + 1)
            bounds = self._bounds if reading.selector.needs_bounds else None
            pages = PageView(layer=layer, keys=keys, bounds=bounds, page_table=tables[part], kept=kept[part])
            row = query[reading.row : reading.row + 1]
            table, count = select_pages(reading.selector, row, pages, reading.budget)
            tables[part, :, : table.shape[2]] = table
            kept[part] = count
        return SelectedPages(tables, kept, start, lengths)
