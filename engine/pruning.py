"""`Pruner`: what the slots keep. It shows a policy the cache, remembers what it chose, and moves what survives."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from ..core.ids import SlotId
from ..core.plan import BatchPlan, Compaction, IntArray, PruneOrder, SlotAssignment
from ..core.pruning import PolicyInfo, PruneParams, Refinement
from ..kernels.backend import Backend
from ..kernels.paged_rows import PagedRows
from ..models.context import Scoring
from ..models.native import NativeRunner
from ..models.rope import RotaryEmbedding
from ..models.runner import ModelRunner
from ..pruning.policy import LayerView, Needs, Policy, Rotation
from ..pruning.select import Selection, select
from ..pruning.table import make_policy, policy_infos
from .cache import KVCache
from .observe import Observations, StepObserver
from .query_rings import QueryRings
from .staging import upload


def offered_policies(runner: ModelRunner) -> dict[str, PolicyInfo]:
    """Every policy, with what it must observe and why this model cannot be pruned by it, if so."""
    offered = {}
    for name, info in policy_infos().items():
        needs = Needs() if info.selects else make_policy(PruneParams(policy=name)).needs
        observes = "all" if needs.mass or needs.moments else "newest" if needs.queries else ""
        obstacle = None
        if all(runner.spec.windows):
            obstacle = "all its layers have a sliding window, which forgets by itself"
        elif needs.moments and runner.rope is None:
            obstacle = "it needs a rotary embedding of a kind that is known here"
        # No layer may go by positions of its own: that the library's code does not, nobody has checked.
        closes_up = info.closes_up and isinstance(runner, NativeRunner) and not any(runner.spec.windows)
        changes = {"observes": observes, "obstacle": obstacle, "closes_up": closes_up}
        offered[name] = msgspec.structs.replace(info, **changes)
    return offered


def offered_refinements(runner: ModelRunner) -> tuple[Refinement, ...]:
    """The wrappers of scores that work with this model."""
    known = all(output_weight(runner, layer) is not None for layer in range(runner.spec.num_layers))
    return ("value-norm", "chunk") if known else ("chunk",)


def output_weight(runner: ModelRunner, layer: int) -> Tensor | None:
    """[hidden, H * D] of a layer, if the runner knows it and its heads are as wide as what the cache stores."""
    weight, spec = runner.output_weight(layer), runner.spec
    return weight if weight is not None and weight.shape[1] == spec.num_heads * spec.head_dim else None


class Pruner:
    """Policies and observations of every slot that prunes, and what was chosen in the last step."""

    def __init__(self, cache: KVCache, runner: ModelRunner, backend: Backend) -> None:
        self._cache = cache
        self._runner = runner
        self._backend = backend
        self._layers = [layer for layer, window in enumerate(runner.spec.windows) if window is None]
        every = len(self._layers) == runner.spec.num_layers
        self._rows: slice | list[int] = slice(None) if every else self._layers
        """The same, as what picks them."""
        self._rotary = None if runner.rope is None else RotaryEmbedding(runner.rope, cache.device)
        self._policies: dict[SlotId, tuple[PruneParams, Policy]] = {}
        self._seen: dict[SlotId, Observations] = {}
        self._rings: dict[int, QueryRings] = {}
        """By window."""
        self._chosen: dict[SlotId, Selection] = {}
        self._scorings: dict[int, Scoring] = {}
        self._closing: dict[SlotId, int] = {}
        """Slots whose positions close up, with the most that they are rotated to."""

    def assign(self, assignment: SlotAssignment) -> None:
        """A sequence enters the slot."""
        slot, params = assignment.slot, assignment.prune
        self._forget(slot)
        if params is not None and params.positions == "cache":
            self._closing[slot] = assignment.max_length
        if params is None or policy_infos()[params.policy].selects or not params.forgets:
            return
        policy = make_policy(params)
        self._policies[slot] = params, policy
        needs = policy.needs
        if not (needs.queries or needs.mass or needs.moments or needs.repeat):
            return
        rotation, first = self._rotation(assignment.max_length), assignment.cached
        seen = Observations(
            needs, params.window, params.sinks, first, rotation=rotation, summed=first, backend=self._backend
        )
        if needs.queries or needs.moments:
            seen.rings = self._rings.setdefault(params.window, QueryRings(len(self._layers), params.window))
            seen.row = seen.rings.take()
        if needs.moments:
            seen.sums = [None] * len(self._layers)
        self._seen[slot] = seen

    def park(self, slot: SlotId) -> object:
        """See `SlotKeeper.park`."""
        policy, seen = self._policies.get(slot), self._seen.get(slot)
        newest = None if seen is None or seen.rings is None else seen.rings.save(seen.row)
        self._forget(slot)
        return policy, None if seen is None else seen.moved(torch.device("cpu")), newest

    def unpark(self, slot: SlotId, state: Any) -> None:
        """See `SlotKeeper.unpark`."""
        policy, seen, newest = state
        if policy is not None:
            self._policies[slot] = policy
        if seen is not None:
            fresh = self._seen[slot]
            seen = self._seen[slot] = seen.moved(self._cache.device)
            seen.rings, seen.row = fresh.rings, fresh.row
            if newest is not None:
                seen.rings.restore(seen.row, newest.to(self._cache.device))

    def watches(self, slot: SlotId) -> bool:
        """Whether the slot's policy looks on while layers attend."""
        return slot in self._seen

    @property
    def looks_on(self) -> bool:
        """Whether any slot's policy does."""
        return bool(self._seen)

    def observer(self, plan: BatchPlan) -> StepObserver | None:
        """Who looks on in this step; None if nothing is to be seen."""
        if not self._seen:
            return None
        observer = StepObserver(plan, self._seen, self._layers, self._longest, self._cache.device)
        return None if observer.is_idle else observer

    def note(self, scorings: dict[int, Scoring]) -> None:
        """How the layers of the last forward pass made logits."""
        self._scorings.update(scorings)

    def compact(self, compactions: Sequence[Compaction]) -> None:
        """Move what was chosen in the last step."""
        for compaction in compactions:
            chosen = self._chosen[compaction.slot]
            self._cache.compact(compaction, self._layers, chosen.keep, self._backend)
            if compaction.slot in self._closing:
                self._close_up(compaction.slot, chosen)
            seen = self._seen.get(compaction.slot)
            if seen is not None:
                for layer, index, counts in zip(self._layers, chosen.keep, chosen.counts, strict=True):
                    seen.keep(layer, index, counts)

    def _close_up(self, slot: SlotId, chosen: Selection) -> None:
        """Rotate the slot's keys, which were rotated to their places before, to those that they have now.

        All heads keep the same entries (`PolicyInfo.closes_up`), so the steps of one serve all.
        """
        assert self._rotary is not None
        kept = chosen.keep[0, 0, : int(chosen.counts[0, 0])].long()
        steps = torch.arange(len(kept), device=kept.device) - kept
        (moved,) = steps.nonzero(as_tuple=True)
        size, length = self._cache.layout.page_size, self._closing[slot]
        pages, offsets = self._cache.page_table[slot, :, :, moved // size].long(), moved % size
        for of_layer in pages:
            keys = self._cache.pool[of_layer, 0, offsets].transpose(0, 1)
            turned = self._rotary.turned(keys, steps[moved], length)
            self._cache.pool[of_layer, 0, offsets] = turned.transpose(0, 1)

    def choose(self, orders: Sequence[PruneOrder]) -> tuple[tuple[IntArray, ...], tuple[float, ...]]:
        """Per order, entries that each head would keep, int32 [R], and the seconds it took to say.

        What the step before this chose is forgotten: it was moved with this step's plan, or never will be.
        """
        self._chosen.clear()
        kept: list[IntArray] = []
        seconds: list[float] = []
        for order in orders:
            started = time.perf_counter()
            params, policy = self._policies[order.slot]
            selection = select(policy, self._views(order.slot), params, order.target)
            self._chosen[order.slot] = selection
            counts = self._counts(order.slot)
            counts[self._rows] = selection.counts.numpy(force=True)
            kept.append(counts.ravel())
            seconds.append(time.perf_counter() - started)
        return tuple(kept), tuple(seconds)

    def clear(self) -> None:
        """Forget all slots."""
        for table in (self._policies, self._seen, self._chosen, self._rings, self._closing):
            table.clear()

    def _forget(self, slot: SlotId) -> None:
        """The slot's sequence is gone."""
        self._policies.pop(slot, None)
        self._chosen.pop(slot, None)
        self._closing.pop(slot, None)
        seen = self._seen.pop(slot, None)
        if seen is not None and seen.rings is not None:
            seen.rings.give(seen.row)

    def _longest(self, slot: SlotId) -> int:
        return int(self._cache.counts(slot).max())

    def _rotation(self, max_length: int) -> Rotation | None:
        rotary = self._rotary
        if rotary is None:
            return None

        def rotate(positions: Tensor) -> tuple[Tensor, Tensor]:
            return rotary(positions, torch.full_like(positions, max_length), torch.float32)

        return rotate

    def _views(self, slot: SlotId) -> Iterator[LayerView]:
        """The layers without a window; keys and values stay in their pages until a policy reads them."""
        cache, seen, needs = self._cache, self._seen.get(slot), self._policies[slot][1].needs
        num_tokens = int(cache.computed[slot])
        host = self._counts(slot)
        lengths, tables = upload(host.astype(np.int64), cache.device).unbind(), cache.page_table[slot].unbind()
        keys, values = cache.pool.unbind(1)
        if seen is not None:
            seen.prepare(num_tokens, cache.device)
        for index, layer in enumerate(self._layers):
            entries, table, scoring = max(host[layer].tolist()), tables[layer], self._scorings[layer]
            positions = PagedRows(cache.entry_positions, table, entries)
            yield LayerView(
                layer=layer,
                stored_keys=PagedRows(keys, table, entries),
                stored_values=PagedRows(values, table, entries),
                stored_positions=positions,
                lengths=lengths[layer],
                num_tokens=num_tokens,
                scale=scoring.scale,
                softcap=scoring.softcap,
                sink_logits=scoring.sinks,
                backend=self._backend,
                output_weight=output_weight(self._runner, layer) if needs.output_weight else None,
                **({} if seen is None else _observed(seen, layer, index, positions, num_tokens)),
            )

    def _counts(self, slot: SlotId) -> IntArray:
        """Entries of each head of the slot, [L, K]; a copy."""
        return self._cache.counts(slot).reshape(self._runner.spec.num_layers, -1)


def _observed(seen: Observations, layer: int, index: int, stored: PagedRows, num_tokens: int) -> dict[str, Any]:
    """The fields of a layer's view that were observed; `stored` [K, E]: positions of its entries.

    `index`: which of the layers without a window it is.
    """
    fields: dict[str, Any] = {"rotation": seen.rotation}
    newest, moments = seen.newest, seen.moments(index, num_tokens)
    if newest is not None:
        fields |= {"queries": newest[0][index], "query_positions": newest[1]}
    if moments is not None:
        fields |= {"query_mean": moments[0], "query_covariance": moments[1]}
    entries = stored.entries
    if layer in seen.mass:
        fields |= {"mass": seen.mass[layer][:, :entries], "seen": (num_tokens - stored.read()).float()}
    if layer in seen.repeated:
        repeated = seen.repeated[layer][:, :entries]
        padded = torch.nn.functional.pad(repeated, (0, entries - repeated.shape[1]))
        # Of what came after the repetition nothing is known, so nothing of it falls before what is.
        fields["repeated"] = padded.masked_fill(stored.read() >= seen.unread, 1.0)
    return fields
