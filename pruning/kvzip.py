"""What the model reads when it repeats its context (KVzip, Kim et al. 2025): near-lossless, for any question, dear.

The engine makes the model repeat the prompt, chunk by chunk, over the full cache; an entry's score is the greatest
probability that any query of the repetition, of any head of its group, gave it. What it could not read, being newer,
counts as read with certainty.
"""

from torch import Tensor

from .policy import LayerView, Limits, Needs


class KVzipPolicy:
    """The paper drops the lowest of all heads and layers, which is the budget `global`."""

    needs = Needs(repeat=True)

    def scores(self, view: LayerView, limits: Limits) -> Tensor:
        """See `Policy.scores`."""
        if view.repeated is None:
            raise ValueError("the view has no repetition: the policy must name it in its needs")
        return view.repeated
