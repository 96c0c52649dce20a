"""The passes of one token per sequence by which a model continues its own proposals.

They are on every step's critical path. Their tensors are made once and change in place, one attention context serves
all passes of as many sequences, and nothing waits for the device before all tokens are drawn. Letters as in
`models.context`; k most tokens of a proposal.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..core.plan import NO_TOKEN, IntArray
from ..kernels.backend import Backend
from ..models.context import AttentionContext
from ..models.native import NativeRunner
from ..models.runner import ModelRunner
from .drafter import Draw, Proposals


def draft_chain(
    runner: ModelRunner,
    logits: Tensor,
    context: AttentionContext,
    lengths: Tensor,
    members: IntArray,
    most: IntArray,
    draw: Draw,
) -> Tensor:
    """Draw up to `most` [S] tokens of S sequences, which come in descending order of it: [k, S] int64, on the device.

    logits [S, V] float32: what the first tokens are drawn from, may be overwritten; context: one row per sequence, at
    the position of its first token (`single_rows`), whose `kept` and `positions` are counted up; lengths [S] int64: see
    `ModelRunner.forward`; members [S]: which of the sequences asked each one is, as `draw` counts them.
    """
    depth = int(most[0])
    # The sequences that go on at each depth are always the first ones.
    active = (most[:, None] > np.arange(depth)).sum(0).tolist()
    drawn = torch.full((depth, len(most)), NO_TOKEN, dtype=torch.int64, device=lengths.device)
    chain = runner.chain(context, depth) if isinstance(runner, NativeRunner) else None
    rules = None if chain is None else draw.rules(members, active)
    if chain is not None and rules is not None:
        chain(drawn, active, logits, rules)
        return drawn
    drawn[0] = draw(logits, members, 0)
    rows = torch.arange(len(most), device=lengths.device)
    for level in range(1, depth):
        count = active[level]
        if count < len(context.query_start) - 1:
            context = _narrowed(context, count)
        context.destinations = None
        ids = drawn[level - 1, :count]
        logits = runner.forward(ids, context.positions, lengths[:count], context, rows[:count])
        drawn[level, :count] = draw(logits, members[:count], level)
        context.kept.add_(1)
        context.positions.add_(1)
    return drawn


def to_proposals(drawn: Tensor, members: IntArray, most: IntArray, asked: IntArray) -> Proposals:
    """What `draft_chain` drew, among all sequences asked for up to `asked` [S] tokens; waits for the device."""
    tokens: IntArray = np.full((len(asked), int(asked.max(initial=1))), NO_TOKEN, np.int32)
    counts: IntArray = np.zeros(len(asked), np.int32)
    tokens[members, : len(drawn)] = drawn.cpu().numpy().T
    counts[members] = most
    return Proposals(tokens, counts)


def no_proposals(asked: IntArray) -> Proposals:
    """For sequences [S] that were asked for up to `asked` [S] tokens."""
    width = int(asked.max(initial=1))
    return Proposals(np.full((len(asked), width), NO_TOKEN, np.int32), np.zeros(len(asked), np.int32))


def single_rows(
    pool: Tensor,
    entry_positions: Tensor,
    tables: tuple[Tensor, Tensor],
    positions: Tensor,
    max_kept: int,
    backend: Backend,
) -> AttentionContext:
    """A context of one row for each of S sequences, at `positions` [S] int64; tables: page tables and kept lengths.

    See `AttentionContext`; max_kept must hold for the last of the passes that use it.
    """
    count = len(positions)
    return AttentionContext(
        pool=pool,
        entry_positions=entry_positions,
        page_table=tables[0],
        kept=tables[1],
        query_start=torch.arange(count + 1, dtype=torch.int32, device=positions.device),
        query_lengths=(1,) * count,
        positions=positions,
        destinations=None,
        max_kept=max_kept,
        backend=backend,
    )


def _narrowed(context: AttentionContext, count: int) -> AttentionContext:
    """The context of its first `count` sequences, over the same tensors."""
    return replace(
        context,
        page_table=context.page_table[:count],
        kept=context.kept[:count],
        query_start=context.query_start[: count + 1],
        query_lengths=(1,) * count,
        positions=context.positions[:count],
        _step=None,
    )
