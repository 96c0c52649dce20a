"""Naive references and case builders for the kernel tests: loops over single entries, no batching, float64."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class PagedCase:
    """A pool with several sequences' entries in shuffled pages, and the new tokens of one step."""

    pool: Tensor
    entry_positions: Tensor
    page_table: Tensor  # [S, K, M]
    kept: Tensor  # [S, K]
    query_lengths: tuple[int, ...]
    query: Tensor
    key: Tensor
    value: Tensor
    positions: Tensor

    @property
    def query_start(self) -> Tensor:
        return torch.tensor([0, *self.query_lengths]).cumsum(0).to(torch.int32)

    @property
    def max_kept(self) -> int:
        longest = self.kept.max(dim=1).values.tolist()
        return max(kept + n for kept, n in zip(longest, self.query_lengths, strict=True))


def make_case(
    kept: list[list[int]],
    lengths: list[int],
    *,
    groups: int = 2,
    head_dim: int = 16,
    value_dim: int | None = None,
    page_size: int = 4,
    gap: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PagedCase:
    """kept [S][K]: entries each head already holds; `gap` > 1 spreads their (increasing) positions at random."""
    generator = torch.Generator().manual_seed(seed)
    num_heads = len(kept[0])
    pages = [[-(-(held + n) // page_size) for held in row] for row, n in zip(kept, lengths, strict=True)]
    total = sum(map(sum, pages)) + 3
    order = torch.randperm(total, generator=generator).tolist()
    width = max(map(max, pages)) + 1
    # Whatever no head owns is NaN: touching it shows.
    pool = torch.full((total, 2, page_size, head_dim), float("nan"), dtype=dtype)
    entry_positions = torch.full((total, page_size), -7, dtype=torch.int32)
    table = torch.full((len(kept), num_heads, width), order.pop(), dtype=torch.int32)
    starts = []
    for s, row in enumerate(kept):
        start = max(row) * gap + 2 if gap > 1 else max(row)
        starts.append(start)
        for k, count in enumerate(row):
            mine = torch.tensor([order.pop() for _ in range(pages[s][k])])
            table[s, k, : len(mine)] = mine
            pool[mine] = torch.randn(len(mine), 2, page_size, head_dim, generator=generator).to(dtype)
            chosen = torch.randperm(start, generator=generator)[:count].sort().values
            flat = (mine[:, None] * page_size + torch.arange(page_size)).view(-1)
            entry_positions.view(-1)[flat[:count]] = chosen.to(torch.int32)
    shapes = ((num_heads * groups, head_dim), (num_heads, head_dim), (num_heads, value_dim or head_dim))
    query, key, value = (torch.randn(sum(lengths), *shape, generator=generator).to(dtype) for shape in shapes)
    positions = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
    held = torch.tensor(kept, dtype=torch.int32)
    return PagedCase(pool, entry_positions, table, held, tuple(lengths), query, key, value, positions)


def make_trees(case: PagedCase, trees: list[bool], seed: int = 0) -> Tensor:
    """Masks [T]: a random tree for each sequence that is to be one, whose positions become start + depth; else none."""
    generator = torch.Generator().manual_seed(seed)
    masks, row = [], 0
    for n, is_tree in zip(case.query_lengths, trees, strict=True):
        start, depths, own = int(case.positions[row]), [0], [1]
        for node in range(1, n):
            parent = int(torch.randint(node, (), generator=generator))
            depths.append(depths[parent] + 1)
            own.append(own[parent] | 1 << node)
        if is_tree:
            case.positions[row : row + n] = start + torch.tensor(depths)
        # Bit 63 is the sign of a 64-bit number.
        masks += [mask - (mask >> 63 << 64) if is_tree else 0 for mask in own]
        row += n
    return torch.tensor(masks)


def naive_append(case: PagedCase) -> None:
    """Store the new tokens one by one."""
    row = 0
    page_size, value_dim = case.pool.shape[2], case.value.shape[-1]
    for s, n in enumerate(case.query_lengths):
        for offset in range(n):
            for k in range(case.kept.shape[1]):
                page, place = divmod(int(case.kept[s, k]) + offset, page_size)
                page = int(case.page_table[s, k, page])
                case.pool[page, 0, place] = case.key[row, k]
                case.pool[page, 1, place, :value_dim] = case.value[row, k]
                case.entry_positions[page, place] = case.positions[row]
            row += 1


def naive_attention(
    case: PagedCase,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """[T, H, Dv] float64: every query against every entry of its head that it may see."""
    num_heads, value_dim = case.query.shape[1], case.value.shape[-1]
    group = num_heads // case.kept.shape[1]
    output = torch.zeros(case.query.shape[0], num_heads, value_dim, dtype=torch.float64)
    row = 0
    for s, n in enumerate(case.query_lengths):
        for h in range(num_heads):
            keys, values, held = _entries(case, s, h // group, n)
            for offset in range(n):
                position = int(case.positions[row + offset])
                seen = held <= position
                if window is not None:
                    seen &= position - held < window
                mask = 0 if visible is None else int(visible[row + offset])
                for new in range(n if mask else 0):
                    seen[int(case.kept[s, h // group]) + new] &= bool(mask >> new & 1)
                scores = keys[seen] @ case.query[row + offset, h].double() * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                extra = math.exp(float(sinks[h])) if sinks is not None else 0.0
                weights = scores.exp() / (scores.exp().sum() + extra)
                output[row + offset, h] = weights @ values[seen][:, :value_dim]
        row += n
    return output


def _entries(case: PagedCase, sequence: int, head: int, new: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values [E, D] (float64) and positions [E] of one head, after the step's entries are stored."""
    page_size = case.pool.shape[2]
    index = torch.arange(int(case.kept[sequence, head]) + new)
    pages = case.page_table[sequence, head].long()[index // page_size]
    entries = case.pool[pages, :, index % page_size].double()
    return entries[:, 0], entries[:, 1], case.entry_positions[pages, index % page_size]
