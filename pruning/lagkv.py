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
        entries = view.entries
        newest = 1 + torch.arange(entries, device=view.lengths.device) / entries
        scores = newest.repeat(len(view.lengths), 1)
        states = view.stored_keys, view.stored_values, view.lengths
        lag_ranks(scores, *states, first=limits.sinks, size=PARTITION, backend=view.backend)
        return scores
