"""`CostCurve`: how many seconds something takes by how many it is done for, measured at start and refreshed by use."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_RATE = 0.1
"""Weight of a new measurement where many were made before."""
_CLIP = 0.25
"""A measurement counts as at most this share off what was expected: it may have met another process, or a kernel
being compiled."""
_FAR_BELOW = 0.25
"""But nothing takes so much less by chance: what was expected at start is wrong."""
_FIRST_CLIP = 1.0
"""The same for the first ones in a place."""
_FIRST, _OFTEN = 3, 8
_PER_DOUBLING = 4
"""Nodes."""
_SHARED = 0.5
"""Part of a deviation that is taken to hold elsewhere too: for more hardly less, for fewer in proportion."""
_UP, _DOWN = 0.25, 1.0
"""Halvings of it per doubling."""


class CostCurve:
    """Seconds for 1 to `most`, linear between nodes; 0 for none. Without points nothing is known: it costs nothing."""

    def __init__(self, points: Sequence[tuple[int, float]], most: int) -> None:
        """`points` are (count, seconds), ascending; beyond the last one the curve goes on as steeply."""
        self._nodes: Floats = np.array(_nodes(most), np.float64)
        self._logs: Floats = np.log2(self._nodes)
        self._seen = np.zeros(len(self._nodes), np.int64)
        self._seed = _through(points, self._nodes)
        self._values: Floats = self._seed.copy()
        self._refresh()

    def at(self, counts: npt.NDArray[Any]) -> Floats:
        """Seconds for each of the counts, which need not be whole."""
        return np.asarray(np.interp(counts, self._xs, self._ys), np.float64)

    def one(self, count: float) -> float:
        """Seconds for one count."""
        return float(np.interp(count, self._xs, self._ys))

    def is_known(self, count: int) -> bool:
        """Whether what so many take was often measured."""
        return bool(self._seen[self._node(count)] >= _OFTEN)

    def _node(self, count: int) -> int:
        return min(int(np.searchsorted(self._nodes, count)), len(self._nodes) - 1)

    @property
    def slope(self) -> float:
        """Seconds for one more, where there are many."""
        return float((self._values[-1] - self._values[0]) / max(self._nodes[-1] - self._nodes[0], 1.0))

    def learn(self, count: int, seconds: float) -> None:
        """So many took `seconds`; what was not timed (0 s) teaches nothing."""
        if seconds <= 0.0 or count < 1:
            return
        expected = self.one(count)
        if expected <= 0.0:
            self._values += seconds
            self._refresh()
            return
        node = self._node(count)
        seen = int(self._seen[node])
        self._seen[node] += 1
        clip = expected * (_CLIP if seen >= _FIRST else _FIRST_CLIP)
        rate = max(_RATE, 1 / (seen + 2))
        if seen < _FIRST and seconds < _FAR_BELOW * expected:
            change = seconds - expected
        else:
            change = rate * min(max(seconds - expected, -clip), clip)
        distance = self._logs - math.log2(count)
        shared = np.exp2(-np.where(distance > 0, _UP * distance, -_DOWN * distance))
        near = np.maximum(1.0 - _PER_DOUBLING * np.abs(distance), 0.0)
        self._values += change * (_SHARED * shared + (1.0 - _SHARED) * near)
        # More never costs less; where that says something else, the place just measured is right.
        level = expected + change
        below = self._nodes <= count
        self._values = np.where(below, np.minimum(self._values, level), np.maximum(self._values, level))
        self._refresh()

    def scale(self, factor: float) -> None:
        """All takes so many times as long."""
        self._values *= factor
        self._refresh()

    def shift(self, seconds: float) -> None:
        """All takes so much longer."""
        self._values += seconds
        self._refresh()

    def relax(self, count: int, seconds: float, share: float) -> None:
        """Return by `share` to the shape measured at start, if `count` takes `seconds`: for what is long unseen."""
        if self._seed[0] > 0.0:
            scale = seconds / float(np.interp(count, self._nodes, self._seed))
            self._values += share * (scale * self._seed - self._values)
            self._refresh()

    def _refresh(self) -> None:
        self._xs: Floats = np.concatenate([[0.0], self._nodes])
        self._ys: Floats = np.concatenate([[0.0], self._values])


def _nodes(most: int) -> list[int]:
    """1 to 8, then 10, 12, 14, 16, 20, ...: four to a doubling, up to `most`."""
    nodes = [1]
    while nodes[-1] < most:
        nodes.append(nodes[-1] + max(2 ** (nodes[-1].bit_length() - 3), 1))
    return nodes


def _through(points: Sequence[tuple[int, float]], nodes: Floats) -> Floats:
    if not points:
        return np.zeros(len(nodes))
    counts, seconds = np.array([count for count, _ in points], np.float64), np.array([cost for _, cost in points])
    seconds = np.maximum.accumulate(seconds)
    values = np.asarray(np.interp(nodes, counts, seconds), np.float64)
    if len(points) > 1:
        slope = (seconds[-1] - seconds[0]) / (counts[-1] - counts[0])
        values += np.maximum(nodes - counts[-1], 0.0) * slope
    return values
