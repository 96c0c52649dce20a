"""Which entries rank best, of all heads of all layers in one call: the contracts, and the choice of a kernel.

No result depends on the implementation: equal scores go to the older entry, a score that is not a number ranks last.
Letters: L' layers, K kv heads, N heads (of any layers), E entries of the longest, G groups of heads.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .backend import Backend
from .cpu_library import ScoredLayerArgs, loaded_library
from .paged_rows import PagedRows


class ScoredLayer(NamedTuple):
    """What the heads of one layer hold; E is the layer's own."""

    scores: Tensor
    """[K, E], of any float type."""
    positions: PagedRows
    """[K, E] int32, ascending within a head."""
    lengths: Tensor
    """[K] int64."""


Ranked = tuple[Tensor, Tensor, Tensor]
"""Scores ready to be compared, [L', K, E] float32; lengths of the heads, and how many of their entries are protected,
[L', K] int64 each."""


def rank_entries(layers: Sequence[ScoredLayer], *, sinks: int, newest: int, backend: Backend = "reference") -> Ranked:
    """The layers side by side.

    Protected entries, at positions below `sinks` or from `newest` on, become inf; what lies past a head's length -inf;
    all others are finite.
    """
    if backend != "cpu":
        return rank_entries_reference(layers, sinks=sinks, newest=newest)
    heads, most = len(layers[0].lengths), max(layer.scores.shape[1] for layer in layers)
    # Held until the kernel is done.
    tensors = [(layer.scores.float().contiguous(), layer.lengths.contiguous()) for layer in layers]
    arguments = (ScoredLayerArgs * len(layers))(
        *(
            ScoredLayerArgs(scores.data_ptr(), lengths.data_ptr(), layer.positions.values(), scores.shape[1])
            for (scores, lengths), layer in zip(tensors, layers, strict=True)
        )
    )
    ranked, counts = torch.empty(len(layers), heads, most), torch.empty(2, len(layers), heads, dtype=torch.int64)
    sizes = len(layers), heads, most, sinks, newest, torch.get_num_threads()
    loaded_library().rank_entries(arguments, ranked.data_ptr(), counts.data_ptr(), *sizes)
    lengths, protected = counts.unbind()
    return ranked, lengths, protected


def rank_entries_reference(layers: Sequence[ScoredLayer], *, sinks: int, newest: int) -> Ranked:
    """See `rank_entries`."""
    most = torch.finfo(torch.float32).max
    scores = _side_by_side([layer.scores.float() for layer in layers])
    positions = _side_by_side([layer.positions.read() for layer in layers])
    lengths = torch.stack([layer.lengths for layer in layers])
    valid = torch.arange(scores.shape[-1], device=scores.device) < lengths[..., None]
    stays = ((positions < sinks) | (positions >= newest)) & valid
    finite = scores.nan_to_num(nan=-most, posinf=most, neginf=-most)
    return finite.masked_fill(stays, float("inf")).masked_fill(~valid, float("-inf")), lengths, stays.sum(-1)


def _side_by_side(layers: Sequence[Tensor]) -> Tensor:
    """[L', K, E] of tensors [K, E], the longest's E; what is added is arbitrary."""
    widths = [layer.shape[1] for layer in layers]
    longest = max(widths)
    if min(widths) < longest:
        layers = [pad(layer, (0, longest - width)) for layer, width in zip(layers, widths, strict=True)]
    return torch.stack(tuple(layers))


def best_entries(scores: Tensor, counts: Tensor, backend: Backend = "reference") -> Tensor:
    """Indices [*N, E'] int32 of the counts [*N] int64 best of scores [*N, E] float32 without NaN, ascending.

    E' is the greatest count, at most E; what lies past a row's own is arbitrary. Waits for the device.
    """
    if backend != "cpu":
        return best_entries_reference(scores.flatten(0, -2), counts.flatten()).view(*counts.shape, -1)
    scores, counts = scores.contiguous(), counts.contiguous()
    keep = torch.empty(*counts.shape, int(counts.max()), dtype=torch.int32)
    pointers = (tensor.data_ptr() for tensor in (scores, counts, keep))
    sizes = counts.numel(), scores.shape[-1], keep.shape[-1]
    loaded_library().best_entries(*pointers, *sizes, torch.get_num_threads())
    return keep


def best_entries_reference(scores: Tensor, counts: Tensor) -> Tensor:
    """`best_entries` of scores [N, E]."""
    rows = len(scores)
    fewest, width = torch.stack([counts.min(), counts.max()]).tolist()
    if fewest == width:
        bar = scores.topk(width, dim=1, sorted=False).values.amin(1, keepdim=True)
    else:
        bar = scores.sort(dim=1, descending=True).values.gather(1, (counts - 1).clamp(min=0)[:, None])
    better, equal = scores > bar, scores == bar
    spare = counts - better.sum(1)
    chosen = (better | (equal & (equal.cumsum(1) <= spare[:, None]))).nonzero()[:, 1].int()
    if fewest == width:
        return chosen.view(rows, width)
    real = torch.arange(width, device=scores.device) < counts[:, None]
    return torch.zeros(rows, width, dtype=torch.int32, device=scores.device).masked_scatter_(real, chosen)


def share_best(scores: Tensor, wanted: int, backend: Backend = "reference") -> Tensor:
    """[G, N] int64: how many of the `wanted` best of each group's scores [G, N, E] float32 are in each row.

    Equal scores go to the smaller row; -inf is none.
    """
    if backend != "cpu":
        return share_best_reference(scores, wanted)
    scores = scores.contiguous()
    shares = torch.empty(scores.shape[:2], dtype=torch.int64)
    loaded_library().share_best(scores.data_ptr(), shares.data_ptr(), *scores.shape, wanted, torch.get_num_threads())
    return shares


def share_best_reference(scores: Tensor, wanted: int) -> Tensor:
    """See `share_best`."""
    every = scores.flatten(1)
    bar = every.topk(min(wanted, every.shape[1]), dim=1, sorted=False).values.amin(1)[:, None, None]
    better, equal = (scores > bar).sum(2), ((scores == bar) & (scores > float("-inf"))).sum(2)
    spare = wanted - better.sum(1, keepdim=True)
    before = equal.cumsum(1) - equal
    return better + (spare - before).clamp(min=0).minimum(equal)
