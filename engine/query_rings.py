"""`QueryRings`: the newest queries of the slots that are watched, all layers and sequences in one tensor.

A step of decode rows writes one query per sequence and layer; here that is a single indexed write.
"""

import torch
from torch import Tensor


class QueryRings:
    """Rings of W queries for sequences that come and go. Letters as in `pruning.policy`; L' layers that are watched.

    The query at position p lies at p % W of its sequence's row. The tensor doubles when rows run out.
    """

    def __init__(self, num_layers: int, window: int) -> None:
        self.window = window
        self._num_layers = num_layers
        self._free: list[int] = []
        self._rows = 0
        self._queries: Tensor | None = None
        """[L', N, W, H, D], N at least `_rows`; made by the first write, which knows type and device."""

    def take(self) -> int:
        """A row for a sequence."""
        if self._free:
            return self._free.pop()
        self._rows += 1
        return self._rows - 1

    def give(self, row: int) -> None:
        """The row's sequence is forgotten."""
        self._free.append(row)

    def write_rows(self, rows: Tensor, positions: Tensor, queries: Tensor) -> None:
        """One query for each of the distinct rows [S] int64, at positions [S]; queries [L', S, H, D]."""
        self._space(queries)[:, rows, positions % self.window] = queries

    def write_chunk(self, layer: int, row: int, start: int, queries: Tensor) -> None:
        """Consecutive queries [n, H, D] of a row in the layer with this index; the first is at position start."""
        newest, last = queries[-self.window :], start + len(queries)
        places = torch.arange(last - len(newest), last, device=queries.device) % self.window
        self._space(queries[None, None])[layer, row, places] = newest

    def read(self, row: int, positions: Tensor) -> Tensor:
        """[L', n, H, D]: what was written last at positions [n]."""
        assert self._queries is not None, "no query was seen"
        return self._queries[:, row, positions % self.window]

    def save(self, row: int) -> Tensor | None:
        """A copy [L', W, H, D] in host memory of what the row holds; None before anything was written."""
        known = self._queries
        return None if known is None or row >= known.shape[1] else known[:, row].to("cpu", copy=True)

    def restore(self, row: int, content: Tensor) -> None:
        """The row holds what `save` gave, on the device by now."""
        self._space(content)[:, row] = content

    def _space(self, like: Tensor) -> Tensor:
        known = self._queries
        if known is None or known.shape[1] < self._rows:
            rows = self._rows if known is None else max(self._rows, 2 * known.shape[1])
            wider = like.new_zeros(self._num_layers, rows, self.window, *like.shape[-2:])
            if known is not None:
                wider[:, : known.shape[1]] = known
            self._queries = known = wider
        return known
