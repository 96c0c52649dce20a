"""Heavy hitters (H2O, Zhang et al. 2023): what drew the most attention from all queries so far.

The paper adds probabilities up, which favours old entries: they had more queries. Here the sum is divided by the
number of queries that could see the entry, so that the score is its mean probability.
"""

from torch import Tensor

from .policy import LayerView, Limits, Needs


class H2OPolicy:
    """The paper splits the budget between heavy hitters and recent entries: set the window to half of it."""

    needs = Needs(mass=True)

    def scores(self, view: LayerView, limits: Limits) -> Tensor:
        """See `Policy.scores`."""
        if view.mass is None or view.seen is None:
            raise ValueError("the view has no attention mass: the policy must name it in its needs")
        return view.mass / view.seen.clamp(min=1)
