"""Which entries stay: scores of a policy -> as many as a budget allows, sinks and the newest window always among them.

Letters: L' layers given, K kv heads, E entries of a layer's longest head, E' entries that the longest head keeps.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.pruning import PruneParams
from ..kernels.ranking import ScoredLayer, best_entries, rank_entries
from .budgets import BUDGETS, Candidates
from .policy import LayerView, Limits, Policy


@dataclass(frozen=True, slots=True)
class Selection:
    """What every head keeps; as `kernels.compaction_reference.compact_kv` wants it."""

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
    layers: list[ScoredLayer] = []
    for view in views:  # nothing else of it is held: what a policy observed may be large
        layers.append(ScoredLayer(policy.scores(view, limits), view.stored_positions, view.lengths))
        num_tokens, backend = view.num_tokens, view.backend
    if not layers:
        raise ValueError("select needs at least one layer")
    ranked, lengths, stays = rank_entries(
        layers, sinks=params.sinks, newest=num_tokens - params.window, backend=backend
    )
    candidates = Candidates(ranked, lengths, stays, num_tokens, backend)
    shares = BUDGETS[params.budget](candidates, params, target)
    counts = torch.minimum(torch.maximum(shares, stays), lengths)
    return Selection(best_entries(ranked, counts, backend), counts.int())
