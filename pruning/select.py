"""Which entries stay: scores of a policy -> as many as a budget allows, sinks and the newest window always among them.

Letters: L' layers given, K kv heads, E entries of a layer's longest head, E' entries that the longest head keeps.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

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
    they may be made one by one; all that follows the scores is done for all layers at once. Waits for the device.
    """
    limits = Limits(params.sinks, params.window, target)
    layers = [_candidates(policy.scores(view, limits), view, limits) for view in views]
    if not layers:
        raise ValueError("select needs at least one layer")
    shares = torch.stack(BUDGETS[params.budget](layers, params, target))
    least, most = (torch.stack(bound) for bound in zip(*((one.protected, one.lengths) for one in layers), strict=True))
    counts = torch.minimum(shares.clamp(min=least), most)
    longest = max(layer.scores.shape[1] for layer in layers)
    padded = [pad(layer.scores, (0, longest - layer.scores.shape[1]), value=float("-inf")) for layer in layers]
    keep = _best(torch.cat(padded), counts.flatten())
    return Selection(keep.unflatten(0, counts.shape), counts.int())


def _candidates(scores: Tensor, view: LayerView, limits: Limits) -> Candidates:
    """Scores with every entry in its rank: protected ones first, then the finite ones, what lies past the end last."""
    most = torch.finfo(torch.float32).max
    finite = scores.float().nan_to_num(nan=-most, posinf=most, neginf=-most)
    stays = protected(view, limits)
    ranked = finite.masked_fill(stays, float("inf")).masked_fill(~view.valid, float("-inf"))
    return Candidates(ranked, view.lengths.long(), stays.sum(1), view.num_tokens)


def _best(scores: Tensor, counts: Tensor) -> Tensor:
    """Indices [N, max(counts)] int32 of the counts [N] best of scores [N, E], ascending; ties go to the older entry."""
    rows = len(scores)
    fewest, width = torch.stack([counts.min(), counts.max()]).tolist()
    if fewest == width:
        bar = scores.topk(width, dim=1, sorted=False).values.amin(1, keepdim=True)
    else:
        bar = scores.sort(dim=1, descending=True).values.gather(1, (counts - 1).clamp(min=0)[:, None])
    better, equal = scores > bar, scores == bar
    spare = counts - better.sum(1)
    chosen = (better | (equal & (equal.cumsum(1) <= spare[:, None]))).nonzero()[:, 1].int()
    if fewest == width:
        return chosen.view(rows, width)
    real = torch.arange(width, device=scores.device) < counts[:, None]
    return torch.zeros(rows, width, dtype=torch.int32, device=scores.device).masked_scatter_(real, chosen)
