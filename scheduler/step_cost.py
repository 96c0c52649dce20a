"""`StepCost`: how long a step will take, learnt from the steps so far; and how much prompt fits a step's time."""

import numpy as np
import numpy.typing as npt

_FORGETTING = 0.98
"""A step weighs this much less with each one after it: about the last fifty count."""
_OUTLIER = 4.0
"""A step that took so many times what was expected counts as that: compiling, another process, a page fault storm."""
_TRUSTED = 6
"""Steps with prompt tokens that must have been seen before predictions count."""
_GROWTH = 2.0
"""Most by which a prompt chunk may exceed the largest one seen: beyond, nothing is known."""
_RIDGE = 1e-6


class StepCost:
    """`seconds = a + b * prompt tokens + c * decodes`, none of them negative.

    Least squares with exponential forgetting. What a step costs also depends on how much context its sequences have;
    that changes slowly, and forgetting follows it.
    """

    def __init__(self) -> None:
        self._moments: npt.NDArray[np.float64] = np.zeros((3, 3))
        self._targets: npt.NDArray[np.float64] = np.zeros(3)
        self._weights: npt.NDArray[np.float64] = np.zeros(3)
        """(a, b, c) in seconds, seconds per prompt token, seconds per decode."""
        self._prompts_seen = 0
        self._largest = 0

    def learn(self, prompt_tokens: int, decodes: int, seconds: float) -> None:
        """A step of so many tokens took `seconds`; steps that were not timed (0 s) teach nothing."""
        if seconds <= 0.0:
            return
        if self._prompts_seen >= _TRUSTED:
            seconds = min(seconds, _OUTLIER * max(self.seconds(prompt_tokens, decodes), 1e-6))
        row = np.array([1.0, prompt_tokens, decodes])
        self._moments = _FORGETTING * self._moments + np.outer(row, row)
        self._targets = _FORGETTING * self._targets + seconds * row
        self._weights = _solve(self._moments, self._targets)
        self._prompts_seen += prompt_tokens > 0
        self._largest = max(self._largest, prompt_tokens)

    def seconds(self, prompt_tokens: int, decodes: int) -> float:
        """What a step of so many tokens is expected to take."""
        return float(self._weights @ (1.0, prompt_tokens, decodes))

    def prompt_tokens_within(self, seconds: float, decodes: int, least: int) -> int:
        """How many prompt tokens a step with `decodes` may take to stay within `seconds`; a multiple of `least`.

        Never fewer than `least`, so that prompts always go on, and all that while little is known.
        """
        if self._prompts_seen < _TRUSTED:
            return least
        left, per_token = seconds - self.seconds(0, decodes), float(self._weights[1])
        if left <= 0.0:  # then prompt tokens may well look free: steps with many of them cost no more than the others
            return least
        most = _GROWTH * self._largest
        fitting = most if left >= most * per_token else left / per_token
        return max(int(fitting) // least * least, least)


def _solve(moments: npt.NDArray[np.float64], targets: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Weights that are not negative: a negative one is left out, and the rest solved again."""
    scale = np.sqrt(np.maximum(np.diag(moments), 1e-12))
    active = np.ones(3, np.bool_)
    while True:
        weights = np.zeros(3)
        use = np.flatnonzero(active)
        normal = moments[np.ix_(use, use)] / np.outer(scale[use], scale[use]) + _RIDGE * np.eye(len(use))
        weights[use] = np.linalg.solve(normal, targets[use] / scale[use]) / scale[use]
        if (weights >= 0.0).all():
            return weights
        active &= weights > 0.0
