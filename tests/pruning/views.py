"""Layer views on random data, with padding full of NaN so that whoever reads it is found out."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quire.kernels.paged_rows import PagedRows
from quire.pruning.policy import LayerView, Needs


def make_view(
    lengths: list[int], *, num_tokens: int, dim: int = 8, seed: int = 0, spare: int = 3, **fields: Any
) -> LayerView:
    """A view whose heads hold `lengths` random entries among `num_tokens` positions, the newest one included."""
    generator = torch.Generator().manual_seed(seed)
    heads, entries = len(lengths), max(lengths) + spare
    keys, values = torch.randn(2, heads, entries, dim, generator=generator)
    positions = torch.full((heads, entries), -7, dtype=torch.int32)
    for head, length in enumerate(lengths):
        chosen = torch.randperm(num_tokens - 1, generator=generator)[: length - 1].sort().values
        positions[head, :length] = torch.cat([chosen, torch.tensor([num_tokens - 1])])
    valid = torch.arange(entries) < torch.tensor(lengths)[:, None]
    keys[~valid], values[~valid] = float("nan"), float("nan")
    view: dict[str, Any] = {
        "layer": 0, "stored_keys": PagedRows.of(keys), "stored_values": PagedRows.of(values),
        "stored_positions": PagedRows.of(positions), "lengths": torch.tensor(lengths), "num_tokens": num_tokens,
        "scale": dim**-0.5,
    }  # fmt: skip
    return LayerView(**view | fields)


def with_states(view: LayerView, keys: Tensor, values: Tensor, **fields: Any) -> LayerView:
    """The view with other keys and values [K, E, D], and other positions [K, E] if there are such."""
    if "positions" in fields:
        fields["stored_positions"] = PagedRows.of(fields.pop("positions"))
    return replace(view, stored_keys=PagedRows.of(keys), stored_values=PagedRows.of(values), **fields)


class GivenScores:
    """A policy that hands out prepared scores, layer by layer."""

    needs = Needs()

    def __init__(self, *scores: Tensor) -> None:
        self._scores = list(scores)

    def scores(self, view: LayerView, limits: object) -> Tensor:
        return self._scores[view.layer]
