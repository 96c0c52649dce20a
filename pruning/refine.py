"""Refinements: policies around a policy. Letters as in `pruning.policy`."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..core.pruning import Refinement
from .masses import as_masses
from .policy import LayerView, Limits, Needs, Policy, protected
from .tokens import mean_by_token

CHUNK = 16
"""Tokens of a chunk: the default page, where ChunkKV's paper took 10 and others 20."""
_EPSILON = 1e-4
_CPU_BLOCK, _BLOCK = 2**22, 2**26
"""Projected numbers at a time: on a CPU few enough for its cache."""


class ValueNormPolicy:
    """CriticalKV (Feng et al. 2025): half of the budget by the score, the rest by (score + 1e-4) * |W_o v|_1.

    The norm is the mean over the group's heads. Scores that may be negative are made masses first. Costs more
    than the layer's output projection did.
    """

    def __init__(self, inner: Policy) -> None:
        self.inner = inner

    @property
    def needs(self) -> Needs:
        """The inner policy's, and the output projection."""
        return replace(self.inner.needs, output_weight=True)

    def scores(self, view: LayerView, limits: Limits) -> Tensor:
        """See `Policy.scores`."""
        masses = as_masses(self.inner.scores(view, limits), view.valid)
        weighed = (masses + _EPSILON) * projected_norms(view)
        ranked = masses.masked_fill(protected(view, limits), float("inf")).masked_fill(~view.valid, float("-inf"))
        first = ranked.topk(min(max(1, limits.target // 2), ranked.shape[1]), dim=1).indices
        # A finite step, above all that is weighed in this layer: means over chunks still tell their parts apart.
        step = weighed.masked_fill(~view.valid, 0).nan_to_num(nan=0.0).amax() + 1
        return weighed.scatter_add(1, first, step.expand(first.shape))


class ChunkPolicy:
    """ChunkKV (Liu et al. 2025): an entry scores the mean of its chunk of CHUNK tokens, over all heads of the layer.

    So neighbours stay or go together; the last chunk that fits may be cut, the budget being exact.
    """

    def __init__(self, inner: Policy) -> None:
        self.inner = inner

    @property
    def needs(self) -> Needs:
        """The inner policy's."""
        return self.inner.needs

    def scores(self, view: LayerView, limits: Limits) -> Tensor:
        """See `Policy.scores`."""
        return mean_by_token(self.inner.scores(view, limits), view, CHUNK)


REFINEMENTS: dict[Refinement, Callable[[Policy], Policy]] = {"value-norm": ValueNormPolicy, "chunk": ChunkPolicy}
"""In the order in which they are put around a policy, whatever the order in which they are asked for."""


def projected_norms(view: LayerView) -> Tensor:
    """[K, E] float32: |W_o v|_1 of each entry's value, mean over the query heads of its group."""
    if view.output_weight is None:
        raise ValueError("the view has no output projection: the policy must name it in its needs")
    states = view.values
    kv_heads, entries, dim = states.shape
    # The heads of a group side by side: the sum of their norms is one norm.
    weights = view.output_weight.unflatten(1, (kv_heads, -1, dim)).permute(1, 3, 2, 0).flatten(2)
    width, hidden = weights.shape[2], view.output_weight.shape[0]
    rows = max(1, (_CPU_BLOCK if weights.device.type == "cpu" else _BLOCK) // width)
    # A mean cannot overflow float16 where a sum might.
    mean = weights.new_full((width,), 1 / width)
    norms = states.new_empty(kv_heads, entries, dtype=torch.float32)
    for head in range(kv_heads):
        for start in range(0, entries, rows):
            some = states[head, start : start + rows]
            norms[head, start : start + rows] = (some @ weights[head]).abs_() @ mean
    return norms * hidden
