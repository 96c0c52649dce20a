"""From a `BatchPlan` to what the model's forward pass takes. Python touches token ids; the rest is vectorised."""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from ..core.ids import SlotId
from ..core.plan import BatchPlan
from ..kernels.backend import Backend
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
    """[S] int32: entries that each sequence gets and keeps."""
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


def build_inputs(plan: BatchPlan, cache: KVCache, max_lengths: np.ndarray, backend: Backend) -> StepInputs:
    """Tensors of one step; the plan's page changes must have been applied to the cache.

    max_lengths [slots] int64: most tokens each slot's sequence can reach. All numbers are computed on the host and go
    to the device in one piece.
    """
    slots = [sequence.slot for sequence in plan.sequences]
    counts = tuple(len(sequence.token_ids) for sequence in plan.sequences)
    stored = tuple(0 if sequence.scratch else len(sequence.token_ids) for sequence in plan.sequences)
    layout = logit_layout(plan)
    host_ids = list(chain.from_iterable(sequence.token_ids for sequence in plan.sequences))
    ends = np.cumsum(counts)
    positions = np.arange(len(host_ids)) + np.repeat([s.start for s in plan.sequences] - (ends - counts), counts)
    lengths = np.repeat(max_lengths[slots], counts)
    parts = (host_ids, positions, lengths, slots, stored, layout.rows, [0], ends)
    # Every part as int64, so that one transfer takes them all.
    packed = torch.from_numpy(np.concatenate([np.asarray(part, np.int64) for part in parts])).to(cache.device)
    input_ids, position_rows, length_rows, slot_rows, new, logit_rows, start = packed.split(
        [len(host_ids)] * 3 + [len(slots)] * 2 + [len(layout.rows), len(slots) + 1]
    )
    longest = cache.longest(slots, counts)
    page_table, kept = cache.tables(slot_rows, longest)
    context = AttentionContext(
        pool=cache.pool,
        entry_positions=cache.entry_positions,
        page_table=page_table,
        kept=kept,
        query_start=start.int(),
        query_lengths=counts,
        positions=position_rows,
        destinations=None,
        max_kept=longest,
        backend=backend,
    )
    return StepInputs(
        input_ids=input_ids,
        positions=position_rows,
        lengths=length_rows,
        context=context,
        logit_rows=logit_rows,
        layout=layout,
        slots=slot_rows,
        new_entries=new.int(),
        host_slots=slots,
        host_lengths=stored,
    )
