"""How a total of cache entries is divided among layers and heads.

A budget sees all layers' scores and says how many entries each head keeps; `select` then raises that to what is
always kept and cuts it to what the head has. Letters: K kv heads, E entries of a layer's longest head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.pruning import Budget, PruneParams


@dataclass(frozen=True, slots=True)
class Candidates:
    """One layer's entries, ready to be ranked."""

    scores: Tensor
    """[K, E] float32: inf where an entry is always kept, -inf past a head's length, else finite."""
    lengths: Tensor
    """[K] int64."""
    protected: Tensor
    """[K] int64: how many entries of a head are always kept."""


def uniform(layers: Sequence[Candidates], params: PruneParams, target: int) -> list[Tensor]:
    """The same number for every head."""
    return [torch.full_like(layer.lengths, target) for layer in layers]


BUDGETS: dict[Budget, Callable[[Sequence[Candidates], PruneParams, int], list[Tensor]]] = {
    "uniform": uniform,
}
"""[K] int64 entries for each head of each layer."""
