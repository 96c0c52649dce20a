"""Unusual keys stay (KeyDiff, Park et al. 2025): score = -cos(k, a), a the mean of the head's normalised keys."""

import torch
from torch import Tensor

from .policy import LayerView, Limits, Needs

_TINY = 1e-12


class KeyDiffPolicy:
    """Needs no query, so it may prune a prompt before the question is known."""

    needs = Needs(values=False)

    def scores(self, view: LayerView, limits: Limits) -> Tensor:
        """See `Policy.scores`."""
        keys = view.keys.to(torch.float32, copy=True)
        keys[:, view.shortest :].masked_fill_(~view.valid[:, view.shortest :, None], 0)
        norms = torch.linalg.vector_norm(keys, dim=-1).clamp(min=_TINY)
        anchor = (1 / norms)[:, None] @ keys
        # The anchor's own length is the same for all keys of a head, but other heads have others.
        anchor = anchor / torch.linalg.vector_norm(anchor, dim=-1, keepdim=True).clamp(min=_TINY)
        return -(anchor @ keys.mT).squeeze(1) / norms
