"""How much attention each entry of one sequence gets from given rows: plain torch, vectorised, on any device.

`kernels.attention_mass_triton` does the same from pages, given the rows' log-sums. Letters: n rows, H query heads, K kv
heads, G = H / K, D head dim, E entries of the longest head.
"""

from typing import Literal

import torch
from torch import Tensor

MAX_WEIGHTS = 1 << 22
"""Most weights that exist at a time (16 MiB of float32): rows are taken in slices, never all against all."""


def attention_columns(
    query: Tensor,
    keys: Tensor,
    entry_positions: Tensor,
    lengths: Tensor,
    positions: Tensor,
    *,
    reduce: Literal["sum", "max"],
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[K, E] float32: the probability that the rows give each entry, summed (or the greatest) over rows and group.

    query [n, H, D] at positions [n]; keys [K, E, D], their rows' own included; entry_positions [K, E]; lengths [K]:
    what lies past them counts for nothing, whatever it holds; sinks [H]: logits without an entry. Softmax in float32.
    4 * n * H * E * D FLOPs at most.
    """
    rows, heads, width = query.shape
    kv_heads, longest = keys.shape[:2]
    group = heads // kv_heads
    missing = torch.arange(longest, device=keys.device) >= lengths[:, None]
    transposed = keys.float().masked_fill(missing[..., None], 0.0).transpose(1, 2)
    folded = query.view(rows, kv_heads, group, width).transpose(0, 1)
    result = torch.zeros(kv_heads, longest, device=keys.device)
    step = max(1, MAX_WEIGHTS // (heads * longest))
    for first in range(0, rows, step):
        part = folded[:, first : first + step]
        hidden = missing[:, None] | (entry_positions[:, None] > positions[first : first + step, None])
        logits = torch.bmm(part.flatten(1, 2).float(), transposed).mul_(scale).unflatten(1, part.shape[1:3])
        weights = _weights(logits, hidden, softcap, sinks)
        if reduce == "sum":
            result += weights.sum((1, 2))
        else:
            result = torch.maximum(result, weights.amax((1, 2)))
    return result


def _weights(logits: Tensor, hidden: Tensor, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Probabilities [K, n, G, E] of logits (overwritten), with hidden [K, n, E] and sinks [H]."""
    kv_heads, rows, group, entries = logits.shape
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    logits.masked_fill_(hidden[:, :, None], float("-inf"))
    if sinks is not None:
        column = sinks.float().view(kv_heads, 1, group, 1).expand(-1, rows, -1, -1)
        logits = torch.cat([logits, column], dim=-1)
    return logits.softmax(-1)[..., :entries]
