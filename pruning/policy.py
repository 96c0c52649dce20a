"""What a pruning policy is: it names what it must observe, and scores cache entries from it. Nothing about pages.

Letters: K kv heads, H query heads, G = H / K, D head dim, E entries of the longest head (shorter heads are padded),
W observed queries, n tokens of the sequence so far.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..kernels.backend import Backend
from ..kernels.paged_rows import PagedRows

Rotation = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Positions [N] int64 -> cosines and sines [N, R / 2] float32 of the model's rotary embedding (half-split layout)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What the engine must gather for a policy while it serves; the default, what the cache holds, costs nothing."""

    queries: bool = False
    """The newest queries, `PruneParams.window` of them."""
    mass: bool = False
    """The attention that each entry got from all queries so far: the dearest observation."""
    moments: bool = False
    """Mean and covariance of the queries, before rotation."""
    repeat: bool = False
    """The greatest attention that each entry got while the model repeated its context."""
    output_weight: bool = False
    """The attention's output projection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerView:
    """One layer of one sequence, as a policy sees it. Read only; what lies past a head's length is arbitrary."""

    layer: int
    stored_keys: PagedRows
    """[K, E, D] in the cache's type, rotated at the entries' own positions, where they lie: for kernels."""
    stored_values: PagedRows
    """[K, E, D], as well."""
    stored_positions: PagedRows
    """[K, E] int32: logical positions, ascending within a head, as well."""
    lengths: Tensor
    """[K] int64: entries of each head."""
    num_tokens: int
    """n, the position of the next token."""
    scale: float
    """Of the scores: q.k * scale."""
    softcap: float | None = None
    sink_logits: Tensor | None = None
    """[H]: one more logit per query head, which takes mass from the entries (gpt-oss)."""
    queries: Tensor | None = None
    """[W, H, D] rotated, oldest first; fewer than asked for while the sequence is short."""
    query_positions: Tensor | None = None
    """[W] int64."""
    mass: Tensor | None = None
    """[K, E] float32: probability summed over the group's heads and all queries."""
    seen: Tensor | None = None
    """[K, E] float32: by how many queries, for `mass`."""
    repeated: Tensor | None = None
    """[K, E] float32: greatest probability in the repetition."""
    query_mean: Tensor | None = None
    """[H, D] float32, before rotation, the sinks' queries left out."""
    query_covariance: Tensor | None = None
    """[H, D, D] float32."""
    rotation: Rotation | None = None
    """None where the model has no rotary embedding that we know."""
    output_weight: Tensor | None = None
    """[hidden, H * D]."""
    backend: Backend = "reference"
    """Which kernels may compute the scores."""

    @property
    def keys(self) -> Tensor:
        """[K, E, D]: a copy of `stored_keys`, made each time."""
        return self.stored_keys.read()

    @property
    def values(self) -> Tensor:
        """[K, E, D]: a copy of `stored_values`, made each time."""
        return self.stored_values.read()

    @property
    def positions(self) -> Tensor:
        """[K, E]: a copy of `stored_positions`, made each time."""
        return self.stored_positions.read()

    @property
    def entries(self) -> int:
        """E."""
        return self.stored_keys.entries

    @property
    def valid(self) -> Tensor:
        """[K, E] bool: index below the head's length."""
        return torch.arange(self.entries, device=self.lengths.device) < self.lengths[:, None]


@dataclass(frozen=True, slots=True)
class Limits:
    """What the selection will do with a layer's scores, for policies that depend on it."""

    sinks: int
    """Entries at positions below it stay."""
    window: int
    """So do the entries at the newest `window` positions."""
    target: int
    """Entries that a head keeps, on average."""


def protected(view: LayerView, limits: Limits) -> Tensor:
    """[K, E] bool: the entries that stay whatever they score."""
    positions = view.positions
    newest = positions >= view.num_tokens - limits.window
    return ((positions < limits.sinks) | newest) & view.valid


class Policy(Protocol):
    """Scores entries; one instance per sequence, so it may remember what it likes."""

    @property
    def needs(self) -> Needs:
        """What must be observed."""
        ...

    def scores(self, view: LayerView, limits: Limits) -> Tensor:
        """[K, E] float32: the higher, the sooner an entry stays; protected ones stay whatever is said.

        Arbitrary past a head's length. Only the order within a head matters to the uniform budget and to `pyramid`;
        `ada` compares the heads of a layer, `prefix` and `threshold` take the numbers as they are.
        """
        ...
