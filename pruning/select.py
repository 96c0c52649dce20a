"""Which entries stay: scores of a policy -> as many as a budget allows, sinks and the newest window always among them.

Letters: L' layers given, K kv heads, E entries of a layer's longest head, E' entries that the longest head keeps.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.pruning import PruneParams
from ..kernels.ranking import best_entries, rank_entries
from .budgets import BUDGETS, Candidates
from .policy import LayerView, Limits, Policy


@dataclass(frozen=True, slots=True)
class Selection:
    """What every head keeps; as `kernels.cache.compact_kv` wants it."""

    keep: Tensor
    """[L', K, E'] int32: indices of entries, strictly ascending up to counts, arbitrary past it."""
    counts: Tensor
    """[L', K] int32."""


def select(policy: Policy, views: Iterable[LayerView], params: PruneParams, target: int) -> Selection:
    """What stays when heads keep `target` entries on average over the given layers.

    Entries at positions below `params.sinks` and at the newest `params.window` positions stay, even beyond the budget.
    Apart from them the counts add up to at most target * K * L' (budget `threshold`: to what its threshold lets
    through), and a head shorter than its share keeps all. NaN ranks last. The views are read once and in order, so
    they may be made one by one; all that follows the scores is done for all layers at once. Waits for the device.
    """
    limits = Limits(params.sinks, params.window, target)
    scores: list[Tensor] = []
    positions: list[Tensor] = []
    lengths: list[Tensor] = []
    for view in views:  # nothing else of it is held: what a policy observed may be large
        scores.append(policy.scores(view, limits).float())
        positions.append(view.positions)
        lengths.append(view.lengths)
        num_tokens, backend = view.num_tokens, view.backend
    if not scores:
        raise ValueError("select needs at least one layer")
    heads = torch.stack(lengths)
    ranked, stays = rank_entries(
        _side_by_side(scores),
        _side_by_side(positions),
        heads,
        sinks=params.sinks,
        newest=num_tokens - params.window,
        backend=backend,
    )
    candidates = Candidates(ranked, heads, stays, num_tokens, backend)
    shares = BUDGETS[params.budget](candidates, params, target)
    counts = shares.clamp(min=stays).minimum(heads)
    keep = best_entries(ranked.flatten(0, 1), counts.flatten(), backend)
    return Selection(keep.unflatten(0, counts.shape), counts.int())


def _side_by_side(layers: Sequence[Tensor]) -> Tensor:
    """[L', K, E] of tensors [K, E], the longest's E; what is added is arbitrary."""
    widths = [layer.shape[1] for layer in layers]
    longest = max(widths)
    if min(widths) < longest:
        layers = [pad(layer, (0, longest - width)) for layer, width in zip(layers, widths, strict=True)]
    return torch.stack(tuple(layers))
