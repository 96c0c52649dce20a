"""What the newest queries look at: one pass of a few rows over the keys, for policies that score by it."""

import torch
from torch import Tensor

from .policy import LayerView

_CPU_BLOCK, _BLOCK = 2**19, 2**24
"""Probabilities computed at a time: on a CPU 2 MiB in float32, so that they never leave its cache."""


def mean_attention(view: LayerView, rows: int) -> Tensor:
    """Probability that the newest `rows` observed queries give each entry, mean over them and over a group's heads.

    Returns [K, E] float32, 0 past a head's length. Rows see no entry newer than themselves. In float32:
    on a CPU oneDNN compiles its bfloat16 product anew for every number of entries, which takes longer than a small
    product. Raises `ValueError` where the view has no queries.
    """
    if view.queries is None or view.query_positions is None:
        raise ValueError("the view has no queries: the policy must name them in its needs")
    queries, positions = view.queries[-rows:], view.query_positions[-rows:]
    (kv_heads, entries, dim), count = view.keys.shape, len(queries)
    keys = view.keys.float().mT
    grouped = (queries.float() * view.scale).view(count, kv_heads, -1, dim).transpose(0, 1)
    # An entry that `count` newer ones follow is older than all of the rows.
    first = max(0, view.shortest - count)
    hidden = (view.positions[:, None, first:] > positions[None, :, None]) | ~view.valid[:, None, first:]
    block = _CPU_BLOCK if view.keys.device.type == "cpu" else _BLOCK
    step = max(1, block // (queries.shape[1] * entries))
    total = torch.zeros(kv_heads, entries, device=view.keys.device)
    for start in range(0, count, step):
        part = grouped[:, start : start + step]
        logits = (part.flatten(1, 2) @ keys).unflatten(1, part.shape[1:3])
        total += _sum(logits, hidden[:, start : start + step, None], view.softcap, view.sink_logits)
    return total.div_(count * grouped.shape[2])


def _sum(logits: Tensor, hidden: Tensor, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """[K, E] of logits [K, w, G, E], which are changed; hidden [K, w, 1, E'] of the last E' entries, sinks [H]."""
    kv_heads, rows, group, entries = logits.shape
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    logits[..., entries - hidden.shape[-1] :].masked_fill_(hidden, float("-inf"))
    if sinks is not None:
        column = sinks.float().view(kv_heads, 1, group, 1).expand(-1, rows, -1, -1)
        logits = torch.cat([logits, column], dim=-1)
    return logits.softmax(-1).sum((1, 2))[:, :entries]
