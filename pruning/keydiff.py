"""Unusual keys stay (KeyDiff, Park et al. 2025): score = -cos(k, a), a the mean of the head's normalised keys."""

from torch import Tensor

from ..kernels.key_scores import mean_cosines
from .policy import LayerView, Limits, Needs


class KeyDiffPolicy:
    """Needs no query, so it may prune a prompt before the question is known."""

    needs = Needs()

    def scores(self, view: LayerView, limits: Limits) -> Tensor:
        """See `Policy.scores`."""
        return -mean_cosines(view.stored_keys, view.lengths, view.backend)
