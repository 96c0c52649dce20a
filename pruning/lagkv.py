"""Entries that stand out from what follows them (LagKV, Liang et al. 2025): keys and values alone, no queries.

After the sinks a head's entries are cut into partitions; a partition's keys (and values) are normalised per channel by
the least and greatest of the next one; what spreads most over the channels ranks first within its partition.
"""

import torch
from torch import Tensor

from ..kernels.lag_ranks import lag_ranks
from .policy import LayerView, Limits, Needs

PARTITION = 128
"""Entries of a partition."""


class LagKVPolicy:
    """Ranks in [0, 1) inside each partition; the last complete partition and what follows it outrank them.

    A head shorter than sinks and two partitions thus keeps its newest entries.
    """

    needs = Needs()

    def scores(self, view: LayerView, limits: Limits) -> Tensor:
        """See `Policy.scores`."""
        entries, sinks = view.valid.shape[1], limits.sinks
        newest = 1 + torch.arange(entries, device=view.keys.device) / entries
        scores = newest.repeat(len(view.lengths), 1)
        count = (entries - sinks) // PARTITION
        if count < 2:
            return scores
        span = slice(sinks, sinks + count * PARTITION)
        ranks = lag_ranks(view.keys[:, span], view.values[:, span], PARTITION, view.backend)
        complete = (view.lengths - sinks) // PARTITION
        ranked = torch.arange(count - 1, device=complete.device) < complete[:, None] - 1
        scored = scores[:, sinks : sinks + (count - 1) * PARTITION].unflatten(1, (count - 1, PARTITION))
        scored.copy_(torch.where(ranked[:, :, None], ranks, scored))
        return scores
