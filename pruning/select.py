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
    scored = [(view, policy.scores(view, limits).float()) for view in views]
    if not scored:
        raise ValueError("select needs at least one layer")
    candidates = _candidates(scored, limits)
    backend = scored[0][0].backend
    shares = BUDGETS[params.budget](candidates, params, target)
    counts = shares.clamp(min=candidates.protected).minimum(candidates.lengths)
    keep = best_entries(candidates.scores.flatten(0, 1), counts.flatten(), backend)
    return Selection(keep.unflatten(0, counts.shape), counts.int())


def _candidates(scored: Sequence[tuple[LayerView, Tensor]], limits: Limits) -> Candidates:
    """All layers' entries in their ranks: protected ones first, then the finite ones, what lies past the end last."""
    view = scored[0][0]
    scores = _side_by_side([scores for _, scores in scored])
    positions = _side_by_side([view.positions for view, _ in scored])
    lengths = torch.stack([view.lengths for view, _ in scored])
    newest = view.num_tokens - limits.window
    ranked, kept = rank_entries(scores, positions, lengths, sinks=limits.sinks, newest=newest, backend=view.backend)
    return Candidates(ranked, lengths, kept, view.num_tokens, view.backend)


def _side_by_side(layers: Sequence[Tensor]) -> Tensor:
    """[L', K, E] of tensors [K, E], the longest's E; what is added is arbitrary."""
    widths = [layer.shape[1] for layer in layers]
    longest = max(widths)
    if min(widths) < longest:
        layers = [pad(layer, (0, longest - width)) for layer, width in zip(layers, widths, strict=True)]
    return torch.stack(tuple(layers))
