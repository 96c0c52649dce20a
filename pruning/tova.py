"""What the newest query looks at (TOVA, Oren et al. 2024): the mean over all heads, so a layer keeps whole tokens."""

from torch import Tensor

from .attention import mean_attention
from .policy import LayerView, Limits, Needs
from .tokens import mean_by_token


class TovaPolicy:
    """The cheapest policy that looks at attention."""

    needs = Needs(queries=True)

    def scores(self, view: LayerView, limits: Limits) -> Tensor:
        """See `Policy.scores`."""
        return mean_by_token(mean_attention(view, rows=1), view)
