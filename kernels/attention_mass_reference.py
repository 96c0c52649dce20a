"""How much probability each cache entry gets: plain torch, the reference for `kernels.attention_mass_triton`.

Letters: T new tokens of the step, S sequences, H query heads, K kv heads, G = H / K, D head dim, B entries of a page,
P pages, M pages of the longest head. Pruning policies score entries by it: H2O (Zhang et al. 2023) adds it up over all
steps, SnapKV (Li et al. 2024) takes the last rows of a prompt, TOVA (Oren et al. 2024) the last row alone.
"""

import torch
from torch import Tensor


def attention_scores(
    query: Tensor,
    pool: Tensor,
    entry_positions: Tensor,
    page_row: Tensor,
    total: int,
    positions: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Scores of one kv head: [n, G, total] float32, -inf where an entry is not seen.

    query [n, G, D]: the new rows' heads; page_row [M]: the head's pages; total: its entries, the new ones included;
    positions [n]: of the rows.
    """
    index = torch.arange(total, device=pool.device)
    pages = page_row.long()[index // pool.shape[2]]
    keys = pool[pages, 0, index % pool.shape[2]].to(query.dtype).float()
    held = entry_positions[pages, index % pool.shape[2]]
    scores = torch.einsum("ngd,ed->nge", query.float(), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = held <= positions[:, None]
    if window is not None:
        seen &= held > positions[:, None] - window
    return scores.masked_fill(~seen[:, None], float("-inf"))


def attention_log_sums(
    query: Tensor,
    pool: Tensor,
    entry_positions: Tensor,
    page_table: Tensor,
    kept: Tensor,
    query_lengths: tuple[int, ...],
    positions: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Natural log of what each row's exponentiated scores (and its head's sink) sum to: [T, H] float32.

    Arguments as of `kernels.attention.paged_attention`. Reads the device: a reference, not for serving.
    """
    sums = query.new_empty(query.shape[:2], dtype=torch.float32)
    group, row = query.shape[1] // kept.shape[1], 0
    for sequence, n in enumerate(query_lengths):
        rows = slice(row, row + n)
        for head in range(kept.shape[1]):
            heads = slice(head * group, (head + 1) * group)
            scores = attention_scores(
                query[rows, heads], pool, entry_positions, page_table[sequence, head], int(kept[sequence, head]) + n,
                positions[rows], scale=scale, window=window, softcap=softcap,
            )  # fmt: skip
            if sinks is not None:
                sink = sinks[heads].float()[None, :, None].expand(n, -1, 1)
                scores = torch.cat([scores, sink], dim=-1)
            sums[rows, heads] = scores.logsumexp(-1)
        row += n
    return sums


def attention_mass(
    query: Tensor,
    pool: Tensor,
    entry_positions: Tensor,
    page_table: Tensor,
    kept: Tensor,
    query_start: Tensor,
    query_lengths: tuple[int, ...],
    positions: Tensor,
    log_sums: Tensor,
    *,
    max_kept: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    observe: int | None = None,
) -> Tensor:
    """Probability that the last `observe` (None: all) new rows of each sequence give each entry of each kv head.

    Arguments as of `kernels.attention.paged_attention`, after `append_kv`; log_sums [T, H] float32: natural
    log-sum-exp of each row, sinks included. Returns [S, K, max_kept] float32: at index e of (s, k) the weight of entry
    e, summed over rows and the G query heads of k; 0 past the head's entries. Mutates nothing. This reference reads
    the device.
    """
    mass = query.new_zeros(len(query_lengths), kept.shape[1], max_kept, dtype=torch.float32)
    group, row = query.shape[1] // kept.shape[1], 0
    for sequence, n in enumerate(query_lengths):
        rows = slice(row + (n - min(n, observe) if observe is not None else 0), row + n)
        row += n
        for head in range(kept.shape[1]):
            heads, total = slice(head * group, (head + 1) * group), int(kept[sequence, head]) + n
            scores = attention_scores(
                query[rows, heads], pool, entry_positions, page_table[sequence, head], total, positions[rows],
                scale=scale, window=window, softcap=softcap,
            )  # fmt: skip
            mass[sequence, head, :total] = (scores - log_sums[rows, heads, None]).exp().sum((0, 1))
    return mass
