"""What pruning policies must have seen: the newest queries, attention so far, moments of the queries, repetition.

Gathered per slot while the layers attend, and only for slots whose policy asks for it. Letters as in
`pruning.policy`; L' layers without a window.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ..core.ids import SlotId
from ..core.plan import BatchPlan
from ..kernels.attention_columns import attention_columns
from ..kernels.backend import Backend
from ..kernels.paged_rows import PagedRows
from ..kernels.query_moments import add_moments, moments_of
from ..models.context import AttentionContext, Scoring
from ..pruning.policy import Needs, Rotation
from .masses import MassRows
from .query_rings import QueryRings
from .staging import upload


@dataclass(slots=True)
class Observations:
    """Of one sequence; the mappings are by layer."""

    needs: Needs
    window: int
    """Queries to remember."""
    sinks: int
    """First positions, whose queries say nothing of the others."""
    first: int
    """Position of the first query that was, or will be, seen."""
    rings: QueryRings | None = None
    """Where the newest queries are, for policies that need them or their moments."""
    row: int = 0
    """There."""
    newest: tuple[Tensor, Tensor] | None = None
    """The newest queries [L', W, H, D], oldest first, and their positions [W], when they were last asked for."""
    rotation: Rotation | None = None
    mass: dict[int, Tensor] = field(default_factory=dict)
    """[K, at least E] float32."""
    repeated: dict[int, Tensor] = field(default_factory=dict)
    """[K, at least E] float32."""
    unread: int = 0
    """First position that no repetition could look at."""
    sums: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)
    """[L'] sums of the queries [H, D] and of their outer products [H, D, D], float32, before rotation."""
    summed: int = 0
    """Position up to which queries are in `sums`; what follows is still in the ring."""
    turns: tuple[int, int, Tensor, Tensor] | None = None
    """Of the rows that were summed last: first position, how many, and what undoes their rotation."""
    backend: Backend = "reference"
    """Which kernels may sum."""

    def moved(self, device: torch.device) -> "Observations":
        """The same in a device's memory, without what the rings hold."""

        def all_of(tables: dict[int, Tensor]) -> dict[int, Tensor]:
            return {layer: table.to(device) for layer, table in tables.items()}

        return replace(
            self,
            rings=None,
            newest=None,
            turns=None,
            mass=all_of(self.mass),
            repeated=all_of(self.repeated),
            sums=[None if pair is None else (pair[0].to(device), pair[1].to(device)) for pair in self.sums],
        )

    def keep(self, layer: int, index: Tensor, counts: Tensor) -> None:
        """The entries `index` [K, E'] of a layer's heads stay, in this order, as far as counts [K]."""
        unused = torch.arange(index.shape[1], device=index.device) >= counts[:, None]
        for tables in (self.mass, self.repeated):
            if layer in tables:
                table = tables[layer]
                blank = unused | (index >= table.shape[1])  # what came after a repetition has not been seen
                tables[layer] = table.gather(1, index.long().masked_fill(blank, 0)).masked_fill_(blank, 0.0)

    def prepare(self, num_tokens: int, device: torch.device) -> None:
        """Make `newest` and `moments` those of the first `num_tokens`."""
        if self.rings is not None and self.needs.queries:
            positions = torch.arange(max(self.first, num_tokens - self.window), num_tokens, device=device)
            self.newest = self.rings.read(self.row, positions), positions
        if self.needs.moments:
            self.sum_ring(num_tokens, device)

    def moments(self, layer: int, num_tokens: int) -> tuple[Tensor, Tensor] | None:
        """Mean [H, D] and covariance [H, D, D] of the queries in the layer with this index; None if none counted."""
        count, sums = num_tokens - max(self.first, self.sinks), self.sums[layer] if self.sums else None
        if sums is None or count < 1:
            return None
        return moments_of(*sums, count, self.backend)

    def sum_ring(self, end: int, device: torch.device) -> None:
        """Count the queries that wait in the ring, up to position `end`."""
        start, self.summed = self.summed, end
        if start >= end:
            return
        assert self.rings is not None
        waiting = self.rings.read(self.row, torch.arange(start, end, device=device))
        for layer, queries in enumerate(waiting):
            self.add_moments(layer, start, queries)

    def add_moments(self, layer: int, start: int, query: Tensor) -> None:
        """Count the rows [n, H, D] that are not the sinks'; turned back to what they were before rotation."""
        skipped = max(self.sinks - start, 0)
        query = query[skipped:]
        rows, heads, width = query.shape
        if not rows:
            return
        known = self.sums[layer]
        if known is None:
            total = query.new_zeros(heads, width, dtype=torch.float32)
            known = self.sums[layer] = total, total.new_zeros(heads, width, width)
        add_moments(query, *self._turned_back(start + skipped, rows, query.device), *known, self.backend)

    def _turned_back(self, first: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines [n, R / 2] that undo the rotation at these positions: the same for all layers."""
        assert self.rotation is not None, "the policy needs a rotary embedding that we know"
        if self.turns is None or self.turns[:2] != (first, rows):
            cos, sin = self.rotation(torch.arange(first, first + rows, device=device))
            # A sharpened embedding (YaRN) also stretches: cos^2 + sin^2 is the square of that.
            stretch = cos[:1, :1].square() + sin[:1, :1].square()
            self.turns = first, rows, cos / stretch, -sin / stretch
        return self.turns[2:]


@dataclass(frozen=True, slots=True)
class _Watched:
    """A sequence of the step whose rows are looked at layer by layer."""

    index: int
    """In the batch."""
    rows: slice
    start: int
    """Position of the first row."""
    scratch: bool
    entries: int
    """Of its longest head, the new ones included."""
    seen: Observations

    @property
    def has_mass(self) -> bool:
        """Whether what its rows give each entry is added up."""
        return self.seen.needs.mass and not self.scratch


@dataclass(frozen=True, slots=True)
class _RingRows:
    """Sequences of one row each, whose queries go to the same rings; [S] int64 each."""

    batch_rows: Tensor
    ring_rows: Tensor
    positions: Tensor
    queries: list[Tensor]
    """[S, H, D] of the layers so far."""


@dataclass(frozen=True, slots=True)
class _Held:
    """A sequence of the step that has draft tokens: what its rows show counts once it is known which of them stay."""

    watched: _Watched
    queries: list[Tensor] = field(default_factory=list)
    """[n, H, D] of the layers so far."""
    scorings: list[Scoring] = field(default_factory=list)
    """Of the same layers."""
    log_sums: list[Tensor] = field(default_factory=list)
    """[n, H] of the same layers, if attention kept them."""


class StepObserver:
    """Looks on for one step; fulfils `models.context.AttentionObserver`."""

    def __init__(
        self,
        plan: BatchPlan,
        slots: dict[SlotId, Observations],
        layers: Sequence[int],
        longest: Callable[[SlotId], int],
        device: torch.device,
    ) -> None:
        """`layers`: those without a window, ascending; `longest`: entries of a slot's longest head before the step."""
        self._layers = {layer: index for index, layer in enumerate(layers)}
        self._watched: list[_Watched] = []
        self._held: dict[SlotId, _Held] = {}
        self._context: AttentionContext | None = None
        self._mass_rows: MassRows | None = None
        """Of those of `_watched` whose masses the kernel finds."""
        self._device = device
        single: dict[QueryRings, list[tuple[int, int, int]]] = {}
        """By ring: (row of the batch, row of the ring, position)."""
        slots_of, starts = plan.decodes.slots.tolist(), plan.decodes.starts.tolist()
        parts = [(slot, start, 1, False, 0) for slot, start in zip(slots_of, starts, strict=True)]
        parts += [(part.slot, part.start, len(part.token_ids), part.scratch, part.drafts) for part in plan.sequences]
        row = 0
        for index, (slot, start, count, scratch, drafts) in enumerate(parts):
            seen = slots.get(slot)
            if seen is not None:
                if seen.rings is not None and not scratch and not drafts:
                    _prepare(seen, start, count, device)
                    if count == 1:
                        single.setdefault(seen.rings, []).append((row, seen.row, start))
                if scratch or drafts or seen.needs.mass or (seen.rings is not None and count > 1):
                    entries = longest(slot) + count
                    watched = _Watched(index, slice(row, row + count), start, scratch, entries, seen)
                    if drafts:
                        self._held[slot] = _Held(watched)
                    else:
                        self._watched.append(watched)
            row += count
        self._single: dict[QueryRings, _RingRows] = {}
        for rings, found in single.items():
            batch_rows, ring_rows, positions = upload(np.array(found, np.int64).T.copy(), device)
            self._single[rings] = _RingRows(batch_rows, ring_rows, positions, [])

    @property
    def is_idle(self) -> bool:
        """Whether nothing is to be seen."""
        return not (self._watched or self._single or self._held)

    @property
    def needs_log_sums(self) -> bool:
        """See `AttentionObserver`."""
        held = (held.watched for held in self._held.values())
        return any(watched.has_mass for watched in (*self._watched, *held))

    def observe(
        self, context: AttentionContext, layer: int, query: Tensor, scoring: Scoring, log_sums: Tensor | None
    ) -> None:
        """See `AttentionObserver`."""
        index = self._layers.get(layer)
        if index is None:
            return
        for rings, rows in self._single.items():
            rows.queries.append(query[rows.batch_rows])
            if len(rows.queries) == len(self._layers):
                rings.write_rows(rows.ring_rows, rows.positions, torch.stack(rows.queries))
        for watched in self._watched:
            _look(watched, context, layer, index, query[watched.rows], scoring, by_kernel=log_sums is not None)
        members = [watched for watched in self._watched if watched.has_mass]
        if log_sums is not None and members:
            if self._mass_rows is None:
                self._mass_rows = _mass_rows(members, self._device)
            chosen = self._mass_rows.rows
            new = self._mass_rows.masses(context, layer, query[chosen], log_sums[chosen], scoring)
            _add_masses(members, layer, new)
        for held in self._held.values():
            self._context = context
            held.queries.append(query[held.watched.rows].clone())
            held.scorings.append(scoring)
            if log_sums is not None:
                held.log_sums.append(log_sums[held.watched.rows].clone())

    def settle(self, stay: Mapping[SlotId, int]) -> None:
        """So many rows of each of the slots that had draft tokens stay; now what they show counts, as a chunk's does.

        Must come before anything else is written to the cache.
        """
        staying: list[tuple[_Held, _Watched]] = []
        for slot, held in self._held.items():
            count, whole = stay[slot], held.watched
            if not count or self._context is None:
                continue
            first = whole.rows.start
            lost = whole.rows.stop - first - count
            rows = slice(first, first + count)
            watched = replace(whole, rows=rows, entries=whole.entries - lost)
            rings = watched.seen.rings
            if rings is not None:
                _prepare(watched.seen, watched.start, count, self._device)
                if count == 1:
                    row, position = upload(np.array([[watched.seen.row], [watched.start]], np.int64), self._device)
                    rings.write_rows(row, position, torch.stack([query[:1] for query in held.queries]))
            by_kernel = bool(held.log_sums)
            for layer, index in self._layers.items():
                query, scoring = held.queries[index][:count], held.scorings[index]
                _look(watched, self._context, layer, index, query, scoring, by_kernel=by_kernel)
            if by_kernel and watched.has_mass:
                staying.append((held, watched))
        self._settle_masses(staying)

    def _settle_masses(self, staying: Sequence[tuple[_Held, _Watched]]) -> None:
        """The masses of the rows that stay, of all sequences together."""
        if not staying or self._context is None:
            return
        members = [watched for _, watched in staying]
        rows = _mass_rows(members, self._device)
        for layer, index in self._layers.items():
            query, log_sums = (
                torch.cat([kept[index][:count] for kept, count in zip(parts, rows.lengths, strict=True)])
                for parts in ([held.queries for held, _ in staying], [held.log_sums for held, _ in staying])
            )
            new = rows.masses(self._context, layer, query, log_sums, staying[0][0].scorings[index])
            _add_masses(members, layer, new)


def _mass_rows(members: Sequence[_Watched], device: torch.device) -> MassRows:
    """For the masses of some sequences."""
    longest = max(watched.entries for watched in members)
    return MassRows.of([w.index for w in members], [w.rows for w in members], longest, device)


def _add_masses(members: Sequence[_Watched], layer: int, new: Tensor) -> None:
    """Take in masses [S', K, E] of a layer."""
    for watched, part in zip(members, new, strict=True):
        _take_in(watched.seen.mass, layer, part[:, : watched.entries], greatest=False)


def _prepare(seen: Observations, start: int, count: int, device: torch.device) -> None:
    """Sum what the ring has no more room for, or what precedes a chunk that is summed directly."""
    assert seen.rings is not None
    if seen.needs.moments and (count > 1 or start - seen.summed >= seen.rings.window):
        seen.sum_ring(start, device)
        seen.summed = start + count if count > 1 else start


def _look(
    watched: _Watched,
    context: AttentionContext,
    layer: int,
    index: int,
    query: Tensor,
    scoring: Scoring,
    *,
    by_kernel: bool,
) -> None:
    """Take in what the rows [n, H, D] of a sequence show in a layer, the `index`-th of those without a window.

    by_kernel: masses are found elsewhere.
    """
    seen = watched.seen
    if watched.scratch:
        seen.unread = watched.start
        _add_columns(watched, seen.repeated, context, layer, query, scoring)
        return
    if seen.rings is not None and len(query) > 1:
        if seen.needs.moments:
            seen.add_moments(index, watched.start, query)
        if seen.needs.queries:
            seen.rings.write_chunk(index, seen.row, watched.start, query)
    if seen.needs.mass and not by_kernel:
        _add_columns(watched, seen.mass, context, layer, query, scoring)


def _add_columns(
    watched: _Watched,
    tables: dict[int, Tensor],
    context: AttentionContext,
    layer: int,
    query: Tensor,
    scoring: Scoring,
) -> None:
    """Take in what the rows [n, H, D] give each entry: the greatest of it where they repeat, else its sum."""
    table, entries = context.page_table[watched.index, layer], watched.entries
    new = attention_columns(
        query,
        PagedRows(context.pool[:, 0], table, entries),
        PagedRows(context.entry_positions, table, entries),
        context.kept[watched.index, layer] + len(query),
        context.positions[watched.rows],
        reduce="max" if watched.scratch else "sum",
        scale=scoring.scale,
        softcap=scoring.softcap,
        sinks=scoring.sinks,
        backend=context.backend,
    )
    if watched.scratch:  # its own entries do not stay
        new = new[:, : entries - len(query)]
    _take_in(tables, layer, new, greatest=watched.scratch)


def _take_in(tables: dict[int, Tensor], layer: int, new: Tensor, *, greatest: bool) -> None:
    """Add [K, E] to a layer's table, or keep the greatest of both."""
    known = tables.get(layer)
    if known is None or known.shape[1] < new.shape[1]:
        width = 0 if known is None else known.shape[1]
        wider = new.new_zeros(len(new), max(new.shape[1], 2 * width))
        if known is not None:
            wider[:, :width] = known
        known = tables[layer] = wider
    part = known[:, : new.shape[1]]
    if greatest:
        torch.maximum(part, new, out=part)
    else:
        part += new
