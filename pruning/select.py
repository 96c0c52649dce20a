"""Which entries stay: scores of a policy -> as many as a budget allows, sinks and the newest window always among them.

Letters: L' layers given, K kv heads, E entries of a layer's longest head, E' entries that the longest head keeps.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.pruning import PruneParams
from .budgets import BUDGETS, Candidates
from .policy import LayerView, Limits, Policy, protected


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
    they may be made one by one. Waits for the device.
    """
    limits = Limits(params.sinks, params.window, target)
    layers = [_candidates(policy.scores(view, limits), view, limits) for view in views]
    if not layers:
        raise ValueError("select needs at least one layer")
    shares = BUDGETS[params.budget](layers, params, target)
    counts = [
        share.clamp(min=layer.protected).clamp(max=layer.lengths) for share, layer in zip(shares, layers, strict=True)
    ]
    table = torch.stack(counts)
    width = int(table.max())
    keep = [_best(layer.scores, count, width) for layer, count in zip(layers, counts, strict=True)]
    return Selection(torch.stack(keep), table.int())


def _candidates(scores: Tensor, view: LayerView, limits: Limits) -> Candidates:
    """Scores with every entry in its rank: protected ones first, then the finite ones, what lies past the end last."""
    most = torch.finfo(torch.float32).max
    finite = scores.float().nan_to_num(nan=-most, posinf=most, neginf=-most)
    stays = protected(view, limits)
    ranked = finite.masked_fill(stays, float("inf")).masked_fill(~view.valid, float("-inf"))
    return Candidates(ranked, view.lengths.long(), stays.sum(1), view.num_tokens)


def _best(scores: Tensor, counts: Tensor, width: int) -> Tensor:
    """Indices [K, width] int32 of the counts [K] best of scores [K, E], ascending; ties go to the older entry."""
    length = scores.shape[1]
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :width]
    order = torch.nn.functional.pad(order, (0, width - order.shape[1]))
    real = torch.arange(width, device=scores.device) < counts[:, None]
    return order.masked_fill(~real, length).sort(dim=1).values.int()
