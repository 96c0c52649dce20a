"""Small keys stay (Devoto et al. 2024): keys of small norm tend to draw the most attention."""

from torch import Tensor

from ..kernels.key_scores import entry_norms
from .policy import LayerView, Limits, Needs


class KNormPolicy:
    """score = -||k||_2."""

    needs = Needs()

    def scores(self, view: LayerView, limits: Limits) -> Tensor:
        """See `Policy.scores`."""
        return -entry_norms(view.stored_keys, view.lengths, view.backend)
