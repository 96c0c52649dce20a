"""Small keys stay (Devoto et al. 2024): keys of small norm tend to draw the most attention."""

import torch
from torch import Tensor

from .policy import LayerView, Limits, Needs


class KNormPolicy:
    """score = -||k||_2."""

    needs = Needs(values=False)

    def scores(self, view: LayerView, limits: Limits) -> Tensor:
        """See `Policy.scores`."""
        return -torch.linalg.vector_norm(view.keys, dim=-1, dtype=torch.float32)
