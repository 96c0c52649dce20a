"""How whole chains of draft tokens are drawn, for the kernel that draws them in one go; pass by pass
`Sampler.propose` draws the same."""

from collections.abc import Sequence

import numpy as np
import torch

from ..core.plan import IntArray
from ..kernels.distributions import MIN_TEMPERATURE
from ..kernels.draft_chain_cpu import DrawRules
from ..kernels.noise import DRAFT_STREAM, stream
from .slots import MIN_P, TEMPERATURE, TOP_P, SlotTable


def chain_rules(table: SlotTable, slots: IntArray, first: IntArray, active: Sequence[int]) -> DrawRules:
    """Of the sequences in `slots` [S], of which nobody asks for penalties, biases or a minimum of tokens.

    first [S]: position of each one's first draft token; active [k]: how many of them, always the first ones, get a
    token at each depth. The table is on the CPU. Rows that are kept are those of `SlotTable.free`.
    """
    sampled, free = table.kinds[slots] > 0, table.free[slots]
    if not sampled.any():
        return DrawRules.likeliest(len(slots))
    owners = torch.from_numpy(slots.astype(np.int64))
    strengths, keys = table.strengths[owners], table.keys[owners]
    depths = np.arange(len(active))[:, None]
    kept = free & (np.arange(len(slots)) < np.array(active)[:, None])
    places = np.where(kept, kept.cumsum().reshape(kept.shape) - 1, -1)
    positions = torch.from_numpy((first + depths).astype(np.int64))
    return DrawRules(
        temperature=strengths[:, TEMPERATURE].clamp(min=MIN_TEMPERATURE) * torch.from_numpy(sampled),
        top_k=keys[:, 1],
        top_p=strengths[:, TOP_P],
        min_p=strengths[:, MIN_P],
        seeds=keys[:, 0],
        positions=torch.where(torch.from_numpy(free), stream(positions, DRAFT_STREAM), positions),
        places=torch.from_numpy(places),
        scaled=torch.empty((int(kept.sum()), table.vocab_size)),
    )
