"""Sequences that forget nothing, but read only the pages that could matter to them (Quest, Tang et al. 2024).

Each full page of theirs has bounds of its keys; a decode step picks pages by what the bounds allow. Prompts read all.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.ids import SlotId
from ..core.model_spec import ModelSpec
from ..core.plan import BatchPlan, SlotAssignment
from ..core.pruning import PruneParams
from ..kernels.backend import Backend
from ..kernels.page_bounds_reference import page_key_bounds
from ..models.context import AttentionContext
from ..pruning.quest import DENSE_LAYERS, select_pages
from ..pruning.table import policy_infos
from .cache import KVCache


class PageSelection:
    """The slots that select, and the bounds of their pages."""

    def __init__(self, cache: KVCache, spec: ModelSpec, backend: Backend) -> None:
        self._cache = cache
        self._backend = backend
        self._layers = [layer for layer, window in enumerate(spec.windows) if window is None and layer >= DENSE_LAYERS]
        self._params: dict[SlotId, PruneParams] = {}
        self._known: dict[SlotId, int] = {}
        """Tokens that the sequence entered with: their rows read all."""
        self._bounded: dict[SlotId, int] = {}
        """Leading pages of each head of the slot whose bounds are known."""
        self._bounds: Tensor | None = None
        """[P, 2, D]; made when first needed."""

    def assign(self, assignment: SlotAssignment) -> None:
        """A sequence enters the slot."""
        self._params.pop(assignment.slot, None)
        prune = assignment.prune
        if prune is not None and prune.forgets and policy_infos()[prune.policy].selects:
            self._params[assignment.slot], self._bounded[assignment.slot] = prune, 0
            self._known[assignment.slot] = len(assignment.prompt_ids) + len(assignment.output_ids)

    def park(self, slot: SlotId) -> object:
        """See `SlotKeeper.park`. Bounds belong to pages, so they are found anew."""
        return self._known.get(slot)

    def unpark(self, slot: SlotId, state: Any) -> None:
        """See `SlotKeeper.unpark`."""
        if slot in self._params:
            self._known[slot] = state

    def selector(self, plan: BatchPlan) -> "StepSelector | None":
        """Who picks pages in this step; None if everybody reads everything."""
        # What comes after what was known at first comes token by token.
        if not self._params or not self._layers:
            return None
        rows: list[tuple[int, int]] = []
        for index, part in enumerate(plan.parts()):
            if part.slot in self._params and part.start >= self._known[part.slot]:
                rows.append((index, self._params[part.slot].target(part.start + 1)))
                self._bound(part.slot)
        if not rows:
            return None
        assert self._bounds is not None
        return StepSelector(rows, frozenset(self._layers), self._bounds)

    def _bound(self, slot: SlotId) -> None:
        """Find the bounds of the slot's pages that have become full."""
        cache, size = self._cache, self._cache.layout.page_size
        if self._bounds is None:
            self._bounds = cache.pool.new_zeros(len(cache.pool), 2, cache.layout.head_dim)
        full, first = int(cache.computed[slot]) // size, self._bounded[slot]
        if full > first:
            pages = cache.page_table[slot, self._layers, :, first:full].flatten()
            find = page_key_bounds
            if self._backend == "triton":
                from ..kernels.page_bounds_triton import page_key_bounds_triton as find  # triton is beside a GPU only
            find(self._bounds, cache.pool, pages, torch.full_like(pages, size))
            self._bounded[slot] = full


class StepSelector:
    """Picks pages for one step; fulfils `models.context.PageSelector`."""

    def __init__(self, rows: Sequence[tuple[int, int]], layers: frozenset[int], bounds: Tensor) -> None:
        """rows: (sequence in the batch, entries that it reads), each of one new token; bounds [P, 2, D]."""
        self._rows = rows
        self._layers = layers
        self._bounds = bounds

    def select(self, context: AttentionContext, layer: int, query: Tensor) -> tuple[Tensor, Tensor] | None:
        """See `PageSelector`."""
        if layer not in self._layers:
            return None
        tables, kept = context.page_table[:, layer].clone(), context.kept[:, layer].clone()
        for index, budget in self._rows:
            row = int(sum(context.query_lengths[:index]))
            part = slice(index, index + 1)
            table, count = select_pages(
                query[row : row + 1], self._bounds, tables[part], kept[part], budget=budget,
                page_size=context.pool.shape[2],
            )  # fmt: skip
            tables[part, :, : table.shape[2]] = table
            kept[part] = count
        return tables, kept
