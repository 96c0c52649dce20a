"""What the newest window of queries looks at (SnapKV, Li et al. 2024), smoothed so that a hit's neighbours stay too.

The prompt should end with the question; for prompts that several questions share use a policy without queries.
"""

from torch import Tensor

from ..kernels.token_means import mean_by_neighbours
from .attention import mean_attention
from .policy import LayerView, Limits, Needs

KERNEL = 5
"""Entries that are averaged; the same as pooling each head and row before their mean."""


class SnapKVPolicy:
    """Mean attention of the window's queries to the entries before it, pooled over neighbours in the cache."""

    needs = Needs(queries=True)

    def scores(self, view: LayerView, limits: Limits) -> Tensor:
        """See `Policy.scores`."""
        attention = mean_attention(view, limits.window)
        # The window itself would leak into its neighbours; it stays anyway.
        newest = view.num_tokens - limits.window
        return mean_by_neighbours(attention, view.stored_positions, view.lengths, newest, KERNEL, view.backend)
