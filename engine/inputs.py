"""From a `BatchPlan` to what the model's forward pass takes. Python touches token ids; the rest is vectorised."""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from ..core.ids import SlotId
from ..core.plan import BatchPlan
from ..kernels.cache import entry_destinations, row_sequences
from ..models.context import AttentionContext
from .cache import KVCache


@dataclass(frozen=True, slots=True)
class LogitLayout:
    """Which rows of the batch need logits, and whose they are; a sequence's scored rows precede its sampled one."""

    rows: list[int]
    """Row of the flattened batch, per row of logits."""
    sampled: list[tuple[int, int]]
    """(sequence, row of logits) that gives its next token."""
    scored: list[tuple[int, int]]
    """(sequence, first row of logits); as many rows as it has `score_ids`."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step, on the device. T tokens, S sequences."""

    input_ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64."""
    lengths: Tensor
    """[T] int64: most tokens the row's sequence can reach."""
    context: AttentionContext
    logit_rows: Tensor
    """[R] int64."""
    layout: LogitLayout
    slots: Tensor
    """[S] int64."""
    new_entries: Tensor
    """[S] int32: tokens of each sequence."""
    host_slots: list[SlotId]
    host_lengths: tuple[int, ...]


def logit_layout(plan: BatchPlan) -> LogitLayout:
    """Ask for logits only where a token is sampled or a prompt token is scored."""
    layout = LogitLayout([], [], [])
    start = 0
    for index, sequence in enumerate(plan.sequences):
        count = len(sequence.token_ids)
        assert count > 0 and len(sequence.score_ids) <= count
        if sequence.score_ids:
            layout.scored.append((index, len(layout.rows)))
            layout.rows.extend(range(start, start + len(sequence.score_ids)))
        start += count
        if sequence.sample:
            layout.sampled.append((index, len(layout.rows)))
            layout.rows.append(start - 1)
    return layout


def build_inputs(plan: BatchPlan, cache: KVCache, max_lengths: np.ndarray) -> StepInputs:
    """Tensors of one step; the plan's page changes must have been applied to the cache.

    max_lengths [slots] int64: most tokens each slot's sequence can reach.
    """
    slots = [sequence.slot for sequence in plan.sequences]
    counts = tuple(len(sequence.token_ids) for sequence in plan.sequences)
    host_ids = list(chain.from_iterable(sequence.token_ids for sequence in plan.sequences))
    starts = [sequence.start for sequence in plan.sequences]
    device, layout = cache.device, logit_layout(plan)
    numbers = torch.tensor([slots, counts, starts, max_lengths[slots].tolist()], device=device)
    slot_tensor, count_tensor, start_tensor, length_tensor = numbers
    query_start = torch.zeros(len(slots) + 1, dtype=torch.int32, device=device)
    query_start[1:] = count_tensor.cumsum(0)
    owner = row_sequences(query_start, len(host_ids))
    positions = torch.arange(len(host_ids), device=device) + (start_tensor - query_start[:-1])[owner]
    longest = cache.longest(slots, counts)
    return StepInputs(
        input_ids=torch.tensor(host_ids, device=device),
        positions=positions,
        lengths=length_tensor[owner],
        context=_context(cache, slot_tensor, query_start, counts, positions, longest),
        logit_rows=torch.tensor(layout.rows, dtype=torch.int64, device=device),
        layout=layout,
        slots=slot_tensor,
        new_entries=count_tensor.int(),
        host_slots=slots,
        host_lengths=counts,
    )


def _context(
    cache: KVCache, slots: Tensor, query_start: Tensor, counts: tuple[int, ...], positions: Tensor, longest: int
) -> AttentionContext:
    """The attention layers' view of the cache for this step."""
    page_table, kept = cache.tables(slots, longest)
    destinations = entry_destinations(
        page_table, kept, query_start, page_size=cache.layout.page_size, num_tokens=len(positions)
    )
    return AttentionContext(
        pool=cache.pool,
        entry_positions=cache.entry_positions,
        page_table=page_table,
        kept=kept,
        query_start=query_start,
        query_lengths=counts,
        positions=positions,
        destinations=destinations,
        max_kept=longest,
    )
