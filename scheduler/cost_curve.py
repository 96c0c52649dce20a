"""`CostCurve`: how many seconds something takes by how many it is done for, measured at start and refreshed by use."""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

FAR_BELOW = 0.25
"""Nothing takes so much less by chance: what was expected at start is wrong, and likely elsewhere by as much."""
_KEPT = 23
"""Measurements of each place that count, the latest: the mean of their middle half, because one may have met another
process, or a kernel being compiled."""
_STAYING = 0.998
"""Of these, so many still count after each measurement elsewhere."""
_OFTEN = 8
_PER_DOUBLING = 4
"""Nodes."""
_UP, _DOWN = 0.25, 1.0
"""What turns out in one place is taken to hold elsewhere too, for more hardly less, for fewer in proportion: halvings
of it per doubling."""
_MOST_DOWN = 0.5
"""But nowhere may it make less than this of it."""


class CostCurve:
    """Seconds for 1 to `most`, linear between nodes; 0 for none. Without points nothing is known: it costs nothing."""

    def __init__(self, points: Sequence[tuple[int, float]], most: int) -> None:
        """`points` are (count, seconds), ascending; beyond the last one the curve goes on as steeply."""
        self._nodes: Floats = np.array(_nodes(most), np.float64)
        self._logs: Floats = np.log2(self._nodes)
        self._latest = [deque[float](maxlen=_KEPT) for _ in self._nodes]
        """Measurements near each node, as shares of what it takes now: if that changes, they are taken to change."""
        self._known: Floats = np.zeros(len(self._nodes))
        """How many of them count."""
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
        return bool(self._known[self._node(count)] >= _OFTEN)

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
        latest = self._latest[node]
        if not latest and seconds < FAR_BELOW * expected:
            self._values[self._known == 0.0] *= seconds / expected
            self._refresh()
            expected = self.one(count)
        latest.append(seconds / expected)
        self._known *= _STAYING
        self._known[node] = min(self._known[node] + 1.0, _KEPT)
        before = self._values[node]
        self._move(count, node, (_middle(list(latest)[-math.ceil(self._known[node]) :]) - 1.0) * expected)
        for place in range(len(latest)):
            latest[place] *= before / self._values[node]

    def _move(self, count: int, node: int, change: float) -> None:
        """`count`, near the node, takes so much longer, and others accordingly: the more, the less is known of them."""
        below, better = self._nodes <= count, self._known > 2.0 * self._known[node]
        least = np.maximum.accumulate(np.where(better, self._values, 0.0))
        most = np.minimum.accumulate(np.where(better, self._values, np.inf)[::-1])[::-1]
        expected = self.one(count)
        level = min(max(expected + change, float(least[node - 1]) if node else 0.0), float(most[node]))
        distance = self._logs - math.log2(count)
        shared = np.exp2(-np.where(distance > 0, _UP * distance, -_DOWN * distance))
        near = np.maximum(1.0 - _PER_DOUBLING * np.abs(distance), 0.0)
        unknown = np.maximum(1.0 - self._known / self._known[node], 0.0)
        moved = (level - expected) * np.maximum(unknown * shared, near)
        values = np.minimum(np.maximum(np.maximum(self._values + moved, _MOST_DOWN * self._values), least), most)
        values[below] = np.minimum.accumulate(np.minimum(values[below], level)[::-1])[::-1]
        values[~below] = np.maximum.accumulate(np.maximum(values[~below], level))
        self._values = values
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


def _middle(values: list[float]) -> float:
    """Mean of the middle half."""
    cut = (len(values) + 1) // 4
    return statistics.fmean(sorted(values)[cut : len(values) - cut])
