"""The check that a model of someone else's code really is served by our attention, made once when it is loaded.

Some architectures never call the registered attention function, take a bias or mask we do not see, or mix the
sequences of a flattened batch. They would answer, and answer wrongly. So two short random sequences are run as one
batch over a small dense stand-in for the paged cache, one of them in two steps, and compared with the library's own
eager attention over each alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

MAX_ERROR = 1e-3
"""Largest difference of float32 logits, relative to the largest logit: orders of summation differ, nothing else."""
MIN_COSINE = 0.97
"""In 16-bit types rounding decides close calls (of expert routers, for one), so only the direction is compared."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What one layer handed to `attend`."""

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Width of the key."""
    value_dim: int


@dataclass(slots=True)
class DenseContext:
    """`AttentionContext` in plain tensors: each sequence attends to its own rows, earlier steps' included."""

    sequences: Sequence[int] = ()
    """Which sequences the step holds."""
    query_lengths: Sequence[int] = ()
    """Rows of each of them, in order."""
    past: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Keys and values so far, each [n, K, D], by sequence and layer."""
    calls: list[AttentionCall] = field(default_factory=list)
    layers_seen: list[int] = field(default_factory=list)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See `AttentionContext.attend`; query [T, H, D], key and value [T, K, ...]."""
        self.layers_seen.append(layer)
        self.calls.append(AttentionCall(layer, query.shape[1], key.shape[1], key.shape[2], value.shape[2]))
        parts = (rows.split(list(self.query_lengths)) for rows in (query, key, value))
        mixed = []
        for sequence, q, k, v in zip(self.sequences, *parts, strict=True):
            if (sequence, layer) in self.past:
                old_key, old_value = self.past[sequence, layer]
                k, v = torch.cat([old_key, k]), torch.cat([old_value, v])
            self.past[sequence, layer] = k, v
            mixed.append(_attend_one(q, k, v, scale, window, softcap, sinks))
        return torch.cat(mixed)


def _attend_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Causal attention within one sequence: [n, H, D], [N, K, D], [N, K, Dv] -> [n, H, Dv], float32 softmax.

    The queries are the last n of the N positions.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), key.float()) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    columns = torch.arange(key.shape[0], device=query.device)
    distance = columns[-query.shape[0] :, None] - columns[None, :]
    visible = (distance >= 0) & (distance < (window or key.shape[0]))
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[0]]
    return torch.einsum("hqk,khd->qhd", weights, value.float()).to(query.dtype)


def logits_agree(ours: Tensor, reference: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits [R, V] computed in `dtype` are the same up to rounding."""
    if not bool(torch.isfinite(ours).all()):
        return False
    if dtype == torch.float32:
        return float((ours - reference).abs().max()) <= MAX_ERROR * max(1.0, float(reference.abs().max()))
    ours, reference = (x - x.mean(-1, keepdim=True) for x in (ours, reference))
    return float(torch.cosine_similarity(ours, reference, dim=-1).min()) >= MIN_COSINE
