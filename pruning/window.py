"""Sinks and the newest entries alone (StreamingLLM, Xiao et al. 2023): the cheapest policy, it forgets the middle."""

from torch import Tensor

from .policy import LayerView, Limits, Needs


class WindowPolicy:
    """The newer, the better."""

    needs = Needs()

    def scores(self, view: LayerView, limits: Limits) -> Tensor:
        """See `Policy.scores`."""
        return view.positions.float()
