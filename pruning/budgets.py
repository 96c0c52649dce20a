"""How a total of cache entries is divided among layers and heads.

A budget sees all layers' scores and says how many entries each head keeps; `select` then raises that to what is
always kept and cuts it to what the head has. Letters: L' layers, K kv heads, E entries of a layer's longest head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.pruning import Budget, PruneParams
from .masses import as_masses

PYRAMID_BETA = 20
"""PyramidKV: the last layer's share is the mean over this."""
ADA_SAFEGUARD = 0.2
"""Ada-KV: the share of its uniform budget that each head keeps for its own best."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """One layer's entries, ready to be ranked."""

    scores: Tensor
    """[K, E] float32: inf where an entry is always kept, -inf past a head's length, else finite."""
    lengths: Tensor
    """[K] int64."""
    protected: Tensor
    """[K] int64: how many entries of a head are always kept."""
    num_tokens: int
    """n, of the sequence; a head may hold fewer entries."""


def uniform(layers: Sequence[Candidates], params: PruneParams, target: int) -> list[Tensor]:
    """The same number for every head."""
    return [torch.full_like(layer.lengths, target) for layer in layers]


def pyramid(layers: Sequence[Candidates], params: PruneParams, target: int) -> list[Tensor]:
    """Fewer from layer to layer, evenly (PyramidKV, Cai et al. 2024).

    Uniform where the last layer would get less than what is always kept.
    """
    # Of the sequence, not of what earlier prunes left: else the first layer would lose a window at each of them.
    most = layers[0].num_tokens - params.window
    low = target / PYRAMID_BETA
    high = 2 * target - low
    if high > most:
        high = most
        low = 2 * target - high
    if len(layers) == 1 or not high >= low >= params.sinks + params.window:
        return uniform(layers, params, target)
    step = (high - low) / (len(layers) - 1)
    # Rounding all marks down from the running total makes the sum exact.
    marks = [int(high * n - step * n * (n - 1) / 2 + 1e-6) for n in range(len(layers) + 1)]
    return [torch.full_like(layer.lengths, marks[i + 1] - marks[i]) for i, layer in enumerate(layers)]


def prefix(layers: Sequence[Candidates], params: PruneParams, target: int) -> list[Tensor]:
    """Every layer keeps the same share of its importance (PrefixKV, Wang et al. 2024), measured on these scores.

    A layer's importance is the mean over its heads of what their best entries hold of all that may go; what is always
    kept stands outside. An entry stays if what ranks before it holds less than a threshold; the threshold that meets
    the total is the one below which as many entries lie, so they are simply taken in that order.
    """
    before = [_share_before(layer) for layer in layers]
    spare = target * len(layers) - int(torch.stack([_always(layer) for layer in layers]).sum())
    shares = torch.cat(before)
    owner = torch.cat([torch.full_like(share, i, dtype=torch.int64) for i, share in enumerate(before)])
    taken = owner[shares.sort(stable=True).indices[: max(0, spare)]].bincount(minlength=len(layers))
    return [layer.protected + taken[i] for i, layer in enumerate(layers)]


def _always(layer: Candidates) -> Tensor:
    """Entries per head that a layer always keeps, rounded up."""
    return layer.protected.float().mean().ceil().long()


def _share_before(layer: Candidates) -> Tensor:
    """[N] float32: what the ranks before each hold of the importance, mean over heads; N ranks that any head has."""
    free = layer.scores.isfinite()
    ranked = as_masses(layer.scores.masked_fill(~free, 0), free).sort(1, descending=True).values
    total = ranked.sum(1, keepdim=True)
    share = (ranked / total.clamp(min=1e-30)).cumsum(1).mean(0)
    return torch.cat([share.new_zeros(1), share])[: int((layer.lengths - layer.protected).max())]


def ada(layers: Sequence[Candidates], params: PruneParams, target: int) -> list[Tensor]:
    """The best of all heads of a layer together, each head sure of a part (Ada-KV, Feng et al. 2024)."""
    return [_ada(layer, target) for layer in layers]


def _ada(layer: Candidates, target: int) -> Tensor:
    heads, entries = layer.scores.shape
    safe = layer.scores.topk(min(max(1, int(target * ADA_SAFEGUARD)), entries), dim=1)
    boosted = safe.values.masked_fill(safe.values > float("-inf"), float("inf"))
    scores = layer.scores.scatter(1, safe.indices, boosted).flatten()
    best = scores.topk(min(heads * target, heads * entries))
    owner = (best.indices // entries).masked_fill(best.values == float("-inf"), heads)
    return owner.bincount(minlength=heads + 1)[:heads]


def threshold(layers: Sequence[Candidates], params: PruneParams, target: int) -> list[Tensor]:
    """All that scores at least `params.threshold`, and no head fewer than `params.floor`: the total is not bounded."""
    bar = params.threshold if params.threshold is not None else float("-inf")
    return [((layer.scores >= bar) & (layer.scores > float("-inf"))).sum(1).clamp(min=params.floor) for layer in layers]


BUDGETS: dict[Budget, Callable[[Sequence[Candidates], PruneParams, int], list[Tensor]]] = {
    "uniform": uniform,
    "pyramid": pyramid,
    "prefix": prefix,
    "ada": ada,
    "threshold": threshold,
}
"""Name -> function of (layers, params, mean entries per head), giving [K] int64 entries for each head of each layer."""
