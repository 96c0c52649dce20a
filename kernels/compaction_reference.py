"""Moving what a pruned head keeps into its leading pages: plain torch, the reference for `kernels.compaction_triton`.

Letters: N heads (of any sequences and layers), D head dim, B entries of a page, P pages of the pool, E most entries
that a head keeps.
"""

import torch
from torch import Tensor


def compact_kv(
    pool: Tensor,
    entry_positions: Tensor,
    source_table: Tensor,
    target_table: Tensor,
    keep: Tensor,
    counts: Tensor,
    *,
    in_place: bool,
) -> None:
    """Entry j of each head's target becomes entry keep[j] of its source, for j < counts: key, value and position.

    pool [P, 2, B, D] and entry_positions [P, B] int32, both contiguous, mutated; source_table [N, M] and target_table
    [N, M'] int32: pages of each head in order; keep [N, E] int32: indices of kept entries, strictly ascending up to
    counts [N] int32 (at most E), arbitrary past it. Without `in_place`, no target page is a source page of any head.
    With it, each head's targets are its own leading source pages. What the target pages hold past counts is left.
    """
    size = pool.shape[2]
    order = torch.arange(keep.shape[1], device=pool.device)
    real = order < counts[:, None]
    index = torch.where(real, keep, 0).long()
    sources = source_table.long().gather(1, index // size)[real], (index % size)[real]
    place = torch.where(real, order, 0)
    targets = target_table.long().gather(1, place // size)[real], (place % size)[real]
    # Indexing copies: all is read before anything is written.
    pool[targets[0], :, targets[1]] = pool[sources[0], :, sources[1]]
    entry_positions[targets] = entry_positions[sources]
