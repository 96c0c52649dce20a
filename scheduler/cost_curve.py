"""`CostCurve`: how many seconds something takes by how many it is done for, measured at start and refreshed by use."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

FAR_BELOW = 0.25
"""Nothing takes so much less by chance: what was expected at start is wrong, and likely elsewhere by as much."""
_KEPT = 15
"""Measurements of each place that count, the latest: the mean of their middle third, because one may have met another
process, or a kernel being compiled."""
_OFTEN = 8
_PER_DOUBLING = 4
"""Nodes."""
_UP, _DOWN = 0.25, 1.0
"""What turns out in one place is taken to hold elsewhere too, for more hardly less, for fewer in proportion: halvings
of it per doubling."""


class CostCurve:
    """Seconds for 1 to `most`, linear between nodes; 0 for none. Without points nothing is known: it costs nothing."""

    def __init__(self, points: Sequence[tuple[int, float]], most: int) -> None:
        """`points` are (count, seconds), ascending; beyond the last one the curve goes on as steeply."""
        self._nodes: Floats = np.array(_nodes(most), np.float64)
        self._logs: Floats = np.log2(self._nodes)
        self._seen = np.zeros(len(self._nodes), np.int64)
        self._measured: Floats = np.zeros((len(self._nodes), _KEPT))
        """Seconds, the last ones of each node, as if they had been taken at the node and at today's pace."""
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
        if not self._seen[node] and seconds < FAR_BELOW * expected:
            self._move(np.where(self._seen == 0, seconds / expected, 1.0) * self._values)
            expected = self.one(count)
        level = self._take(node, seconds / expected) * expected
        known, below = np.minimum(self._seen, _KEPT), self._nodes <= count
        # More never costs less: what is known better bounds this place, and this place what is known less.
        better = known > known[node]
        level = max(level, float(self._values[better & below].max(initial=0.0)))
        level = min(level, float(self._values[better & ~below].min(initial=math.inf)))
        distance = self._logs - math.log2(count)
        shared = np.exp2(-np.where(distance > 0, _UP * distance, -_DOWN * distance))
        near = np.maximum(1.0 - _PER_DOUBLING * np.abs(distance), 0.0)
        believed = known[node] / (known[node] + known)
        values = self._values + (level - expected) * (believed * shared + (1.0 - believed) * near)
        own = self._measured[node].copy()
        self._move(np.where(below, np.minimum(values, level), np.maximum(values, level)))
        self._measured[node] = own

    def _take(self, node: int, ratio: float) -> float:
        """Keep a measurement near a node, of `ratio` times what was expected; what that is to be on the whole."""
        self._measured[node, self._seen[node] % _KEPT] = ratio * self._values[node]
        self._seen[node] += 1
        latest = np.sort(self._measured[node, : self._seen[node]])
        cut = len(latest) // 3
        return float(latest[cut : len(latest) - cut].mean() / self._values[node])

    def _move(self, values: Floats) -> None:
        """All takes so long now, and what was measured before would take accordingly."""
        self._measured *= (values / np.maximum(self._values, 1e-12))[:, None]
        self._values = values
        self._refresh()

    def scale(self, factor: float) -> None:
        """All takes so many times as long."""
        self._move(self._values * factor)

    def shift(self, seconds: float) -> None:
        """All takes so much longer."""
        self._move(self._values + seconds)

    def relax(self, count: int, seconds: float, share: float) -> None:
        """Return by `share` to the shape measured at start, if `count` takes `seconds`: for what is long unseen."""
        if self._seed[0] > 0.0:
            scale = seconds / float(np.interp(count, self._nodes, self._seed))
            self._move(self._values + share * (scale * self._seed - self._values))

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
