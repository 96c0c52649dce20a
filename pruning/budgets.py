"""How a total of cache entries is divided among layers and heads.

A budget sees all layers' scores and says how many entries each head keeps; `select` then raises that to what is
always kept and cuts it to what the head has. Letters: L' layers, K kv heads, E entries of a layer's longest head.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.pruning import Budget, PruneParams
from ..kernels.backend import Backend
from ..kernels.ranking import best_entries, share_best
from .masses import as_masses

PYRAMID_BETA = 20
"""PyramidKV: the last layer's share is the mean over this."""
ADA_SAFEGUARD = 0.2
"""Ada-KV: the share of its uniform budget that each head keeps for its own best."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The entries of all layers, ready to be ranked."""

    scores: Tensor
    """[L', K, E] float32: inf where an entry is always kept, -inf past a head's length, else finite."""
    lengths: Tensor
    """[L', K] int64."""
    protected: Tensor
    """[L', K] int64: how many entries of a head are always kept."""
    num_tokens: int
    """n, of the sequence; a head may hold fewer entries."""
    backend: Backend = "reference"
    """Which kernels may rank them."""


def uniform(entries: Candidates, params: PruneParams, target: int) -> Tensor:
    """The same number for every head."""
    return torch.full_like(entries.lengths, target)


def pyramid(entries: Candidates, params: PruneParams, target: int) -> Tensor:
    """Fewer from layer to layer, evenly (PyramidKV, Cai et al. 2024).

    Uniform where the last layer would get less than what is always kept. What a layer lost earlier, while the shape was
    another, others keep instead.
    """
    # Of the sequence, not of what earlier prunes left: else the first layer would lose a window at each of them.
    most, layers = entries.num_tokens - params.window, len(entries.lengths)
    low = target / PYRAMID_BETA
    high = 2 * target - low
    if high > most:
        high = most
        low = 2 * target - high
    shares = [target] * layers
    if layers > 1 and high >= low >= params.sinks + params.window:
        step = (high - low) / (layers - 1)
        # Rounding all marks down from the running total makes the sum exact.
        marks = [int(high * n - step * n * (n - 1) / 2 + 1e-6) for n in range(layers + 1)]
        shares = [end - start for start, end in pairwise(marks)]
    held = entries.lengths.amin(1).tolist()  # under this budget the heads of a layer hold equally many
    return torch.tensor(_within(held, shares), device=entries.lengths.device)[:, None].expand_as(entries.lengths)


def _within(held: list[int], shares: list[int]) -> list[int]:
    """The shares, but no more of a layer than it holds: the others keep evenly more, as far as they can."""
    total = min(sum(held), sum(shares))

    def lifted(lift: int) -> list[int]:
        return [min(most, share + lift) for most, share in zip(held, shares, strict=True)]

    lift = bisect_left(range(max(held)), total, key=lambda lift: sum(lifted(lift)))
    kept = lifted(lift)
    for layer in range(len(kept)):
        if sum(kept) > total and kept[layer] == shares[layer] + lift:
            kept[layer] -= 1
    return kept


def prefix(entries: Candidates, params: PruneParams, target: int) -> Tensor:
    """Every layer keeps the same share of its importance (PrefixKV, Wang et al. 2024), measured on these scores.

    A layer's importance is the mean over its heads of what their best entries hold of all that may go; what is always
    kept stands outside. An entry stays if what ranks before it holds less than a threshold; the threshold that meets
    the total is the one below which as many entries lie, so they are simply taken in that order.
    """
    shares = _shares_before(entries)
    # Of each layer, rounded up.
    always = int(entries.protected.float().mean(1).ceil().sum())
    spare = max(0, target * len(shares) - always)
    order = shares.flatten().sort(stable=True)
    owner = (order.indices // shares.shape[1])[:spare].masked_fill(order.values[:spare].isinf(), len(shares))
    return entries.protected + owner.bincount(minlength=len(shares) + 1)[:-1, None]


def _shares_before(entries: Candidates) -> Tensor:
    """[L', E] float32: what the ranks before each hold of a layer's importance, mean over its heads.

    inf for ranks that none of its heads has.
    """
    free = entries.scores.isfinite()
    ranked = as_masses(entries.scores.masked_fill(~free, 0), free).sort(2, descending=True).values
    total = ranked.sum(2, keepdim=True)
    share = (ranked / total.clamp(min=1e-30)).cumsum(2).mean(1)
    before = pad(share, (1, -1))
    ranks = (entries.lengths - entries.protected).amax(1, keepdim=True)
    return before.masked_fill(torch.arange(before.shape[1], device=before.device) >= ranks, float("inf"))


def ada(entries: Candidates, params: PruneParams, target: int) -> Tensor:
    """The best of all heads of a layer together, each head sure of a part (Ada-KV, Feng et al. 2024)."""
    layers, heads, longest = entries.scores.shape
    sure = entries.lengths.clamp(max=max(1, int(target * ADA_SAFEGUARD)))
    safe = best_entries(entries.scores.flatten(0, 1), sure.flatten(), entries.backend).long()
    real = torch.arange(safe.shape[1], device=safe.device) < sure.flatten()[:, None]
    boosted = pad(entries.scores.flatten(0, 1), (0, 1))
    boosted.scatter_(1, safe.masked_fill(~real, longest), float("inf"))
    scores = boosted[:, :longest].view(layers, heads, longest)
    return share_best(scores, heads * target, entries.backend)


def over_all(entries: Candidates, params: PruneParams, target: int) -> Tensor:
    """The best of all heads of all layers together (KVzip, Kim et al. 2025); what is always kept is in the total."""
    scores = entries.scores.flatten(0, 1)
    return share_best(scores[None], len(scores) * target, entries.backend).view_as(entries.lengths)


def threshold(entries: Candidates, params: PruneParams, target: int) -> Tensor:
    """All that scores at least `params.threshold`, and no head fewer than `params.floor`: the total is not bounded."""
    bar = params.threshold if params.threshold is not None else float("-inf")
    enough = (entries.scores >= bar) & (entries.scores > float("-inf"))
    return enough.sum(2).clamp(min=params.floor)


BUDGETS: dict[Budget, Callable[[Candidates, PruneParams, int], Tensor]] = {
    "uniform": uniform,
    "pyramid": pyramid,
    "prefix": prefix,
    "ada": ada,
    "global": over_all,
    "threshold": threshold,
}
"""Name -> function of (entries, params, mean entries per head), giving the entries of each head, [L', K] int64."""
