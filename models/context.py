"""`AttentionContext`: one step's view of the paged KV cache, handed down to every attention layer.

It is planned once per step (by `engine/`) and used once per layer (by the runners). Letters: T new tokens of the
step, S sequences, L layers, H query heads, K kv heads, D head dim, B entries of a page, P pages of the pool,
M pages of the longest head in this step.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..kernels.append_rotated import Rotation, append_rotated
from ..kernels.attention import check_paged, check_query, paged_attention
from ..kernels.attention_cpu import PagedStep
from ..kernels.backend import TRITON_BACKENDS, Backend
from ..kernels.cache import append_kv, entry_destinations


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a layer's queries and keys become logits."""

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    """[H]"""


class AttentionObserver(Protocol):
    """Looks on while a step attends; pruning policies live on what it sees."""

    @property
    def needs_log_sums(self) -> bool:
        """Whether rows' log-sum-exps are of use; attention keeps them only if so, and by no means always."""
        ...

    def observe(
        self, context: "AttentionContext", layer: int, query: Tensor, scoring: Scoring, log_sums: Tensor | None
    ) -> None:
        """The layer has stored its new entries and attended with query [T, H, D] (rotated).

        log_sums [T, H] float32, if attention kept them: natural, over all entries that a row sees and its sink.
        """
        ...


@dataclass(frozen=True, slots=True)
class SelectedPages:
    """What the rows of a layer read; rows of a sequence that read different pages count as S' > S sequences."""

    page_table: Tensor
    """[S', K, M'] int32"""
    kept: Tensor
    """[S', K] int32"""
    query_start: Tensor
    """[S' + 1] int32"""
    query_lengths: tuple[int, ...] | None


class PageSelector(Protocol):
    """Says which pages the rows of some sequences read (Quest): they attend to those and to nothing else."""

    def select(self, context: "AttentionContext", layer: int, query: Tensor) -> SelectedPages | None:
        """What is read for query [T, H, D] of the layer; None: everything.

        Selected pages are full, but for the newest, where the step's entries are stored already.
        """
        ...


@dataclass(slots=True)
class AttentionContext:
    """Where the new tokens' keys and values go and what they attend to."""

    pool: Tensor
    """[P, 2, B, D]: keys (0) and values (1). Mutated by `attend`."""
    entry_positions: Tensor
    """[P, B] int32: logical position of each entry. Mutated by `attend`."""
    page_table: Tensor
    """[S, L, K, M] int32: pages of each head, in order; columns past a head's length are arbitrary valid ids."""
    kept: Tensor
    """[S, L, K] int32: entries each head holds before this step."""
    query_start: Tensor
    """[S + 1] int32: first row of each sequence in the flattened batch, then T."""
    query_lengths: tuple[int, ...] | None
    """The same as host numbers: rows of each sequence. None: the device alone knows (in a CUDA graph)."""
    positions: Tensor
    """[T] int64: logical position of each row."""
    destinations: Tensor | None
    """[L, T, K] int64: flat entry index (page * B + offset) at which each row's key and value are stored; None: found
    when a backend asks for it (the C++ kernels do not)."""
    max_kept: int
    """Host upper bound of `kept + query length` over the batch."""
    table_rows: Tensor | None = None
    """[S] int64: `page_table` [N, L, K, M] and `kept` [N, L, K] are those of all slots, and these the sequences' rows
    (`destinations` must then be given); None: they are the batch's own."""
    visible: Tensor | None = None
    """[T] int64: masks of rows that verify a tree of drafts, see `kernels.attention`; None: no row has one."""
    backend: Backend = "reference"
    """Which kernels append and attend."""
    observer: AttentionObserver | None = None
    """Whoever looks on; nobody, as a rule."""
    selector: PageSelector | None = None
    """Whoever picks pages; nobody, as a rule."""
    scorings: dict[int, Scoring] = field(default_factory=dict)
    """Of the layers that attended."""
    layers_seen: list[int] = field(default_factory=list)
    """Layers that called `attend`: the transformers runner's check that no layer went another way."""
    _step: PagedStep | None = None
    """What the C++ kernels need of all this, checked and made ready by the first layer."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """Store the new keys and values of `layer`, then attend causally over all kept entries.

        query [T, H, D], key [T, K, D], value [T, K, Dv <= D]; sinks [H] or None: logits of attention sinks that take
        mass without a value (gpt-oss). With a rotation, query and key are views of its heads, which are rotated first;
        without, they are rotated already. Returns [T, H, Dv] in query's dtype.
        """
        self.layers_seen.append(layer)
        scoring = self.scorings[layer] = Scoring(scale, softcap, sinks)
        if self.observer is None:
            return self._attend(layer, query, key, value, scoring, window, rotation)
        log_sums = None
        if self.backend in TRITON_BACKENDS and self.selector is None and self.observer.needs_log_sums:
            log_sums = query.new_empty(query.shape[:2], dtype=torch.float32)
        mixed = self._attend(layer, query, key, value, scoring, window, rotation, log_sums)
        self.observer.observe(self, layer, query, scoring, log_sums)
        return mixed

    def whole_step(self, scale: float, dtype: torch.dtype) -> PagedStep | None:
        """For all layers in one call, each as by `attend` with queries in `dtype`; None if somebody needs them singly.

        The layers count as seen from here on.
        """
        watched = self.observer is not None or self.selector is not None
        if self.backend != "cpu" or dtype != self.pool.dtype or watched:
            return None
        layers = range(self.page_table.shape[1])
        self.layers_seen.extend(layers)
        self.scorings.update(dict.fromkeys(layers, Scoring(scale)))
        return self._step or self._plan()

    def _attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
        window: int | None,
        rotation: Rotation | None,
        log_sums: Tensor | None = None,
    ) -> Tensor:
        scale, softcap, sinks = scoring.scale, scoring.softcap, scoring.sinks
        # A layer that computes in another type than the cache stores (some upcast their queries) is the reference's.
        if self.backend == "cpu" and query.dtype == self.pool.dtype and self.selector is None:
            if rotation is not None:
                rotation.apply(self.backend)
            step = self._step or self._plan()
            check_query(
                query, self.pool, self.page_table, self.positions, value_dim=value.shape[2], window=window, sinks=sinks
            )
            return step.append_and_attend(
                layer, query, key, value, scale=scale, window=window, softcap=softcap, sinks=sinks
            )
        self._append(layer, key, value, rotation)
        selected = None if self.selector is None else self.selector.select(self, layer, query)
        if selected is None:
            tables = self.page_table[:, layer], self.kept[:, layer]
            selected = SelectedPages(*tables, self.query_start, self.query_lengths)
        return paged_attention(
            query,
            self.pool,
            self.entry_positions,
            selected.page_table,
            selected.kept,
            selected.query_start,
            selected.query_lengths,
            self.positions,
            max_kept=self.max_kept,
            value_dim=value.shape[-1],
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            table_rows=self.table_rows,
            visible=self.visible,
            log_sums=log_sums,
            backend=self.backend,
        )

    def _append(self, layer: int, key: Tensor, value: Tensor, rotation: Rotation | None) -> None:
        """Store the rows' entries, and rotate the heads if that is still to be done."""
        if self.destinations is None:
            self.destinations = self._destinations()
        cache, where = (self.pool, self.entry_positions), (self.destinations[layer], self.positions)
        if rotation is None:
            append_kv(*cache, key, value, *where, self.backend)
        else:
            append_rotated(rotation, value, *cache, *where, self.backend)

    def _plan(self) -> PagedStep:
        table, kept, rows = self.page_table, self.kept, self.table_rows
        if rows is not None:
            table, kept = table[rows], kept[rows]
        tensors = (table, kept, self.query_start, self.positions, self.visible)
        check_paged(self.pool, self.entry_positions, *tensors)
        self._step = PagedStep(self.pool, self.entry_positions, *tensors)
        return self._step

    def _destinations(self) -> Tensor:
        return entry_destinations(
            self.page_table,
            self.kept,
            self.query_start,
            page_size=self.pool.shape[2],
            num_tokens=self.positions.shape[0],
        )
