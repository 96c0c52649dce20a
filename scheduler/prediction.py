"""`LengthPredictor`: how long an output will be, learnt from those that have ended. For ordering, never a limit."""

from collections import OrderedDict

_MEMORY = 0.1
"""Weight of the newest output in a running mean: about the last twenty count."""
_TRUSTED = 4
"""Outputs that a class must have had before its mean is used."""
_MOST_CLASSES = 10_000
"""Classes remembered; the longest unused is forgotten."""
_UNKNOWN = 256.0
"""Tokens expected before anything was learnt."""

_Class = tuple[str, int]


class LengthPredictor:
    """Running means of output lengths per tenant and magnitude of the prompt's length, per tenant, and of all.

    The finest class that has seen enough outputs answers: the ranking is what matters, and a history per user ranks
    well without a model of its own.
    """

    def __init__(self) -> None:
        self._means: OrderedDict[_Class, tuple[int, float]] = OrderedDict()
        """Class -> number of outputs seen, mean length in tokens; longest unused first."""

    def predict(self, tenant: str, prompt_tokens: int, most: int) -> float:
        """Expected output tokens, at most `most`."""
        for name in _classes(tenant, prompt_tokens):
            seen, mean = self._means.get(name, (0, 0.0))
            if seen >= _TRUSTED:
                return min(mean, float(most))
        return min(_UNKNOWN, float(most))

    def learn(self, tenant: str, prompt_tokens: int, output_tokens: int) -> None:
        """An output ended after so many tokens."""
        for name in _classes(tenant, prompt_tokens):
            seen, mean = self._means.pop(name, (0, 0.0))
            share = max(_MEMORY, 1 / (seen + 1))
            self._means[name] = seen + 1, mean + share * (output_tokens - mean)
        while len(self._means) > _MOST_CLASSES:
            self._means.popitem(last=False)


def _classes(tenant: str, prompt_tokens: int) -> tuple[_Class, _Class, _Class]:
    """The classes of a request, finest first; a tenant's name is not empty beside the class of all."""
    return (f"t{tenant}", prompt_tokens.bit_length()), (f"t{tenant}", -1), ("", -1)
