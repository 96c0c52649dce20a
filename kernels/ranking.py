"""Which entries rank best, of all heads of all layers in one call: the contracts, and the choice of a kernel.

No result depends on the implementation: equal scores go to the older entry, a score that is not a number ranks last.
Letters: N heads (of any layers), E entries of the longest, G groups of heads.
"""

import torch
from torch import Tensor

from .backend import Backend
from .cpu_library import loaded_library


def rank_entries(
    scores: Tensor, positions: Tensor, lengths: Tensor, *, sinks: int, newest: int, backend: Backend = "reference"
) -> tuple[Tensor, Tensor]:
    """Scores ready to be compared, [*N, E] float32, and how many entries of each head are protected, [*N] int64.

    scores [*N, E] float32; positions [*N, E] int32; lengths [*N] int64. Protected entries, at positions below `sinks`
    or from `newest` on, become inf; what lies past a head's length -inf; all others are finite.
    """
    if backend != "cpu":
        return rank_entries_reference(scores, positions, lengths, sinks=sinks, newest=newest)
    entries = scores.shape[-1]
    inputs = scores.contiguous(), positions.contiguous(), lengths.contiguous()
    ranked, kept = torch.empty(scores.shape), torch.empty(lengths.shape, dtype=torch.int64)
    pointers = (tensor.data_ptr() for tensor in (*inputs, ranked, kept))
    loaded_library().rank_entries(*pointers, lengths.numel(), entries, sinks, newest, torch.get_num_threads())
    return ranked, kept


def rank_entries_reference(
    scores: Tensor, positions: Tensor, lengths: Tensor, *, sinks: int, newest: int
) -> tuple[Tensor, Tensor]:
    """See `rank_entries`."""
    most = torch.finfo(torch.float32).max
    valid = torch.arange(scores.shape[-1], device=scores.device) < lengths[..., None]
    stays = ((positions < sinks) | (positions >= newest)) & valid
    finite = scores.nan_to_num(nan=-most, posinf=most, neginf=-most)
    return finite.masked_fill(stays, float("inf")).masked_fill(~valid, float("-inf")), stays.sum(-1)


def best_entries(scores: Tensor, counts: Tensor, backend: Backend = "reference") -> Tensor:
    """Indices [N, E'] int32 of the counts [N] int64 best of scores [N, E] float32 without NaN, ascending.

    E' is the greatest count, at most E; what lies past a row's own is arbitrary. Waits for the device.
    """
    if backend != "cpu":
        return best_entries_reference(scores, counts)
    scores, counts = scores.contiguous(), counts.contiguous()
    rows, entries = scores.shape
    keep = torch.empty(rows, int(counts.max()), dtype=torch.int32)
    pointers = (tensor.data_ptr() for tensor in (scores, counts, keep))
    loaded_library().best_entries(*pointers, rows, entries, keep.shape[1], torch.get_num_threads())
    return keep


def best_entries_reference(scores: Tensor, counts: Tensor) -> Tensor:
    """See `best_entries`."""
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
