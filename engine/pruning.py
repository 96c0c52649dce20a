"""`Pruner`: what the slots keep. It shows a policy the cache, remembers what it chose, and moves what survives."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from ..core.ids import SlotId
from ..core.plan import BatchPlan, Compaction, IntArray, PruneOrder, SequencePlan, SlotAssignment
from ..core.pruning import PolicyInfo, PruneParams, Refinement
from ..kernels.backend import Backend
from ..models.context import Scoring
from ..models.rope import RotaryEmbedding
from ..models.runner import ModelRunner
from ..pruning.policy import LayerView, Needs, Policy, Rotation
from ..pruning.select import Selection, select
from ..pruning.table import make_policy, policy_infos
from .cache import KVCache, read_heads
from .observe import Observations, StepObserver


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
        offered[name] = msgspec.structs.replace(info, observes=observes, obstacle=obstacle)
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
        self._rotary = None if runner.rope is None else RotaryEmbedding(runner.rope, cache.device)
        self._policies: dict[SlotId, tuple[PruneParams, Policy]] = {}
        self._seen: dict[SlotId, Observations] = {}
        self._chosen: dict[SlotId, Selection] = {}
        self._scorings: dict[int, Scoring] = {}

    def assign(self, assignment: SlotAssignment) -> None:
        """A sequence enters the slot."""
        slot, params = assignment.slot, assignment.prune
        for table in (self._policies, self._seen, self._chosen):
            table.pop(slot, None)
        if params is None or policy_infos()[params.policy].selects or not params.forgets:
            return
        policy = make_policy(params)
        self._policies[slot] = params, policy
        needs = policy.needs
        rotation = self._rotation(assignment.max_length)
        seen = Observations(needs, params.window, params.sinks, assignment.cached, rotation)
        if needs.queries or needs.mass or needs.moments or needs.repeat:
            self._seen[slot] = seen

    def park(self, slot: SlotId) -> object:
        """See `SlotKeeper.park`."""
        seen = self._seen.pop(slot, None)
        return self._policies.pop(slot, None), None if seen is None else seen.moved(torch.device("cpu"))

    def unpark(self, slot: SlotId, state: Any) -> None:
        """See `SlotKeeper.unpark`."""
        policy, seen = state
        if policy is not None:
            self._policies[slot] = policy
        if seen is not None:
            self._seen[slot] = seen.moved(self._cache.device)

    def observer(self, plan: BatchPlan) -> StepObserver | None:
        """Who looks on in this step; None if nothing is to be seen."""
        if not self._seen:
            return None
        parts = list(plan.parts())
        watched = {part.slot: self._seen[part.slot] for part in parts if self._watches(part)}
        return StepObserver(parts, watched, frozenset(self._layers), self._longest) if watched else None

    def note(self, scorings: dict[int, Scoring]) -> None:
        """How the layers of the last forward pass made logits."""
        self._scorings.update(scorings)

    def compact(self, compactions: Sequence[Compaction]) -> None:
        """Move what was chosen in the last step; what of it is not asked for now is forgotten."""
        for compaction in compactions:
            chosen = self._chosen[compaction.slot]
            self._cache.compact(compaction, self._layers, chosen.keep, self._backend)
            seen = self._seen.get(compaction.slot)
            if seen is not None:
                for layer, index, counts in zip(self._layers, chosen.keep, chosen.counts, strict=True):
                    seen.keep(layer, index, counts)
        self._chosen.clear()

    def choose(self, orders: Sequence[PruneOrder]) -> tuple[tuple[IntArray, ...], tuple[float, ...]]:
        """Per order, entries that each head would keep, int32 [R], and the seconds it took to say."""
        kept: list[IntArray] = []
        seconds: list[float] = []
        for order in orders:
            started = time.perf_counter()
            params, policy = self._policies[order.slot]
            selection = select(policy, self._views(order.slot), params, order.target)
            self._chosen[order.slot] = selection
            counts = self._cache.counts(order.slot).reshape(self._runner.spec.num_layers, -1)
            counts[self._layers] = selection.counts.cpu().numpy()
            kept.append(counts.ravel())
            seconds.append(time.perf_counter() - started)
        return tuple(kept), tuple(seconds)

    def clear(self) -> None:
        """Forget all slots."""
        for table in (self._policies, self._seen, self._chosen):
            table.clear()

    def _watches(self, part: SequencePlan) -> bool:
        seen = self._seen.get(part.slot)
        return seen is not None and (part.scratch or seen.needs.queries or seen.needs.mass or seen.needs.moments)

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
        """The layers without a window, made one by one: a long context is held once, not twice."""
        cache, seen = self._cache, self._seen.get(slot)
        num_tokens = int(cache.computed[slot])
        host = cache.counts(slot).reshape(self._runner.spec.num_layers, -1)
        for layer in self._layers:
            entries, table = int(host[layer].max()), cache.page_table[slot, layer]
            lengths = torch.from_numpy(host[layer].astype(np.int64)).to(cache.device)
            positions = read_heads(cache.entry_positions[..., None], table, entries)[..., 0]
            scoring = self._scorings[layer]
            yield LayerView(
                layer=layer,
                keys=read_heads(cache.pool[:, 0], table, entries),
                values=read_heads(cache.pool[:, 1], table, entries),
                positions=positions,
                lengths=lengths,
                valid=torch.arange(entries, device=cache.device) < lengths[:, None],
                num_tokens=num_tokens,
                scale=scoring.scale,
                softcap=scoring.softcap,
                sink_logits=scoring.sinks,
                output_weight=output_weight(self._runner, layer),
                **({} if seen is None else _observed(seen, layer, positions, num_tokens)),
            )


def _observed(seen: Observations, layer: int, positions: Tensor, num_tokens: int) -> dict[str, Any]:
    """The fields of a layer's view that were observed; positions [K, E] of its entries."""
    fields: dict[str, Any] = {"rotation": seen.rotation}
    newest, moments = seen.newest(layer, num_tokens), seen.moments(layer, num_tokens)
    if newest is not None:
        fields |= {"queries": newest[0], "query_positions": newest[1]}
    if moments is not None:
        fields |= {"query_mean": moments[0], "query_covariance": moments[1]}
    entries = positions.shape[1]
    if layer in seen.mass:
        fields |= {"mass": seen.mass[layer][:, :entries], "seen": (num_tokens - positions).float()}
    if layer in seen.repeated:
        repeated = seen.repeated[layer][:, :entries]
        # What came after the repetition has not been seen.
        fields["repeated"] = torch.nn.functional.pad(repeated, (0, entries - repeated.shape[1]))
    return fields
