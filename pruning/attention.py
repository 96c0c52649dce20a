"""What the newest queries look at: one pass of a few rows over the keys, for policies that score by it."""

import torch
from torch import Tensor

from .policy import LayerView

_BLOCK = 2**21
"""Probabilities computed at a time: 8 MiB in float32, so that a CPU finds them in its cache from pass to pass."""


def mean_attention(view: LayerView, rows: int) -> Tensor:
    """Probability that the newest `rows` observed queries give each entry, mean over them and over a group's heads.

    Returns [K, E] float32, 0 past a head's length. Rows see no entry newer than themselves. Raises `ValueError` where
    the view has no queries.
    """
    if view.queries is None or view.query_positions is None:
        raise ValueError("the view has no queries: the policy must name them in its needs")
    queries, positions = view.queries[-rows:], view.query_positions[-rows:]
    (kv_heads, entries, dim), count = view.keys.shape, len(queries)
    grouped = (queries.float() * view.scale).view(count, kv_heads, -1, dim).permute(1, 2, 0, 3)
    hidden = (view.positions[:, None] > positions[None, :, None]) | ~view.valid[:, None]
    step = max(1, _BLOCK // (grouped.shape[1] * count * entries))
    sinks = None if view.sink_logits is None else view.sink_logits.float().view(kv_heads, -1, 1, 1)
    parts = []
    for start in range(0, kv_heads, step):
        heads = slice(start, start + step)
        sink = None if sinks is None else sinks[heads]
        parts.append(_attention(grouped[heads], view.keys[heads], hidden[heads, None], view.softcap, sink))
    return torch.cat(parts)


def _attention(queries: Tensor, keys: Tensor, hidden: Tensor, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """[k, E] of scaled queries [k, G, W, D] and keys [k, E, D]; hidden [k, 1, W, E], sinks [k, G, 1, 1]."""
    logits = (queries.flatten(1, 2) @ keys.float().transpose(1, 2)).view(*queries.shape[:3], -1)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits.masked_fill_(hidden, float("-inf"))
    if sinks is not None:
        logits = torch.cat([logits, sinks.expand(*logits.shape[:3], 1)], dim=-1)
    return logits.softmax(-1).mean((1, 2))[:, : keys.shape[1]]
