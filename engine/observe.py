"""What pruning policies must have seen: the newest queries, attention so far, moments of the queries, repetition.

Gathered per slot while the layers attend, and only for slots whose policy asks for it. Letters as in
`pruning.policy`; L' layers without a window.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..core.ids import SlotId
from ..core.plan import SequencePlan
from ..kernels.attention_columns import attention_columns
from ..kernels.rotary import rotate_reference
from ..models.context import AttentionContext, Scoring
from ..pruning.policy import Needs, Rotation
from .cache import read_heads


@dataclass(slots=True)
class Observations:
    """Of one sequence; the lists and mappings are by layer."""

    needs: Needs
    window: int
    """Queries to remember."""
    sinks: int
    """First positions, whose queries say nothing of the others."""
    first: int
    """Position of the first query that was, or will be, seen."""
    rotation: Rotation | None = None
    queries: dict[int, Tensor] = field(default_factory=dict)
    """[window, H, D]: the query at position p lies at p % window."""
    mass: dict[int, Tensor] = field(default_factory=dict)
    """[K, at least E] float32."""
    repeated: dict[int, Tensor] = field(default_factory=dict)
    """[K, at least E] float32."""
    sums: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Sum of the queries [H, D] and of their outer products [H, D, D], float32, before rotation."""

    def moved(self, device: torch.device) -> "Observations":
        """The same in a device's memory."""

        def all_of(tables: dict[int, Tensor]) -> dict[int, Tensor]:
            return {layer: table.to(device) for layer, table in tables.items()}

        return replace(
            self,
            queries=all_of(self.queries),
            mass=all_of(self.mass),
            repeated=all_of(self.repeated),
            sums={layer: (total.to(device), outer.to(device)) for layer, (total, outer) in self.sums.items()},
        )

    def keep(self, layer: int, index: Tensor, counts: Tensor) -> None:
        """The entries `index` [K, E'] of a layer's heads stay, in this order, as far as counts [K]."""
        unused = torch.arange(index.shape[1], device=index.device) >= counts[:, None]
        for tables in (self.mass, self.repeated):
            if layer in tables:
                table = tables[layer]
                blank = unused | (index >= table.shape[1])  # what came after a repetition has not been seen
                tables[layer] = table.gather(1, index.long().masked_fill(blank, 0)).masked_fill_(blank, 0.0)

    def newest(self, layer: int, num_tokens: int) -> tuple[Tensor, Tensor] | None:
        """The newest queries [W, H, D], oldest first, and their positions [W]."""
        if layer not in self.queries:
            return None
        ring = self.queries[layer]
        positions = torch.arange(max(self.first, num_tokens - self.window), num_tokens, device=ring.device)
        return ring[positions % self.window], positions

    def moments(self, layer: int, num_tokens: int) -> tuple[Tensor, Tensor] | None:
        """Mean [H, D] and covariance [H, D, D] of the queries; None if none was counted."""
        count = num_tokens - max(self.first, self.sinks)
        if layer not in self.sums or count < 1:
            return None
        mean, outer = (total / count for total in self.sums[layer])
        return mean, outer - mean[:, :, None] * mean[:, None, :]


@dataclass(frozen=True, slots=True)
class _Watched:
    """A sequence of the step that is observed."""

    index: int
    """In the batch."""
    rows: slice
    entries: int
    """Of its longest head, the new ones included."""
    plan: SequencePlan
    seen: Observations


class StepObserver:
    """Looks on for one step; fulfils `models.context.AttentionObserver`."""

    def __init__(
        self,
        plans: Sequence[SequencePlan],
        slots: dict[SlotId, Observations],
        layers: frozenset[int],
        longest: Callable[[SlotId], int],
    ) -> None:
        """`layers`: those without a window; `longest`: entries of a slot's longest head before the step."""
        self._layers = layers
        self._watched: list[_Watched] = []
        start = 0
        for index, plan in enumerate(plans):
            end = start + len(plan.token_ids)
            if plan.slot in slots:
                entries = longest(plan.slot) + end - start
                self._watched.append(_Watched(index, slice(start, end), entries, plan, slots[plan.slot]))
            start = end

    def observe(self, context: AttentionContext, layer: int, query: Tensor, scoring: Scoring) -> None:
        """See `AttentionObserver`."""
        if layer not in self._layers:
            return
        for watched in self._watched:
            needs, rows = watched.seen.needs, query[watched.rows]
            if watched.plan.scratch:
                _add_columns(watched, watched.seen.repeated, context, layer, rows, scoring)
                continue
            if needs.queries:
                _remember(watched, layer, rows)
            if needs.moments:
                _add_moments(watched, layer, rows)
            if needs.mass:
                _add_columns(watched, watched.seen.mass, context, layer, rows, scoring)


def _remember(watched: _Watched, layer: int, query: Tensor) -> None:
    """The last of the rows [n, H, D] take the place of the oldest in the ring."""
    window, start = watched.seen.window, watched.plan.start
    ring = watched.seen.queries.get(layer)
    if ring is None:
        ring = watched.seen.queries[layer] = query.new_zeros(window, *query.shape[1:])
    newest = query[-window:]
    last = start + len(query)
    ring[torch.arange(last - len(newest), last, device=query.device) % window] = newest


def _add_moments(watched: _Watched, layer: int, query: Tensor) -> None:
    """Count the rows [n, H, D] that are not the sinks'; turned back to what they were before rotation."""
    seen, start = watched.seen, watched.plan.start
    assert seen.rotation is not None, "the policy needs a rotary embedding that we know"
    skipped = max(seen.sinks - start, 0)
    query = query[skipped:].float()
    if not len(query):
        return
    first = start + skipped
    cos, sin = seen.rotation(torch.arange(first, first + len(query), device=query.device))
    # A sharpened embedding (YaRN) also stretches: cos^2 + sin^2 is the square of that.
    stretch = cos[:1, :1].square() + sin[:1, :1].square()
    plain = rotate_reference(query, cos / stretch, -sin / stretch)
    total, outer = plain.sum(0), torch.einsum("nhd,nhe->hde", plain, plain)
    if layer in seen.sums:
        seen.sums[layer][0].add_(total)
        seen.sums[layer][1].add_(outer)
    else:
        seen.sums[layer] = total, outer


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
        read_heads(context.pool[:, 0], table, entries),
        read_heads(context.entry_positions[..., None], table, entries)[..., 0],
        context.kept[watched.index, layer] + len(query),
        context.positions[watched.rows],
        reduce="max" if watched.plan.scratch else "sum",
        scale=scoring.scale,
        softcap=scoring.softcap,
        sinks=scoring.sinks,
    )
    if watched.plan.scratch:  # its own entries do not stay
        new = new[:, : entries - len(query)]
    known = tables.get(layer)
    if known is None or known.shape[1] < new.shape[1]:
        width = 0 if known is None else known.shape[1]
        wider = new.new_zeros(len(new), max(new.shape[1], 2 * width))
        if known is not None:
            wider[:, :width] = known
        known = tables[layer] = wider
    part = known[:, : new.shape[1]]
    if watched.plan.scratch:
        torch.maximum(part, new, out=part)
    else:
        part += new
