"""From a `BatchPlan` to what the model's forward pass takes. Python touches prompts; the rest is vectorised."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from ..core.plan import NO_TOKEN, BatchPlan, Decodes, IntArray
from ..kernels.backend import Backend
from ..models.context import AttentionContext
from .cache import KVCache
from .staging import upload
from .trees import TreeRows


@dataclass(frozen=True, slots=True)
class LogitLayout:
    """Which rows of the batch need logits, and whose they are; a sequence's scored rows precede its sampled ones."""

    rows: IntArray
    """Row of the flattened batch, per row of logits; those of the plan's decodes come first."""
    sampled: IntArray
    """Row of logits per token to draw: of the plan's decodes, then of the `samplers`."""
    samplers: list[int]
    """Which of `plan.sequences` sample."""
    sampler_rows: list[int]
    """First row of logits of each of them; the others of its sampled rows follow."""
    drafted: list[int]
    """How many those are: a row for each of the draft tokens at the end of its `token_ids`."""
    scored: list[tuple[int, int]]
    """(sequence, first row of logits); as many rows as it has `score_ids`."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step, on the device. T tokens, S sequences."""

    input_ids: Tensor
    """[T] int64."""
    rotations: Tensor
    """[T] int64: positions to which queries and keys are rotated; the logical ones are the context's."""
    lengths: Tensor
    """[T] int64: most positions that the row's sequence is rotated to."""
    context: AttentionContext
    logit_rows: Tensor
    """[R] int64."""
    layout: LogitLayout
    slots: Tensor
    """[S] int64."""
    new_entries: Tensor
    """[S] int32: entries that each sequence gets and keeps; where there are drafts none yet, see `KVCache.advance`."""
    host_slots: IntArray
    host_lengths: tuple[int, ...]


def logit_layout(plan: BatchPlan) -> LogitLayout:
    """Ask for logits only where a token is sampled or a prompt token is scored.

    Here, and wherever a step is computed, `drafts` says how many of a sequence's `token_ids`, the last ones, are
    proposals.
    """
    start = len(plan.decodes)
    rows = list(range(start))
    sampled = list(range(start))
    samplers: list[int] = []
    sampler_rows: list[int] = []
    drafted: list[int] = []
    scored: list[tuple[int, int]] = []
    for index, sequence in enumerate(plan.sequences):
        count = len(sequence.token_ids)
        assert count > 0 and len(sequence.score_ids) <= count
        if sequence.score_ids:
            scored.append((index, len(rows)))
            rows.extend(range(start, start + len(sequence.score_ids)))
        start += count
        if sequence.sample:
            samplers.append(index)
            sampler_rows.append(len(rows))
            drafted.append(sequence.drafts)
            sampled.extend(range(len(rows), len(rows) + 1 + sequence.drafts))
            rows.extend(range(start - 1 - sequence.drafts, start))
    return LogitLayout(np.array(rows, np.int32), np.array(sampled, np.int32), samplers, sampler_rows, drafted, scored)


def fill_unknown(input_ids: Tensor, slots: Tensor, decodes: Decodes, newest: Tensor) -> None:
    """Write the tokens of the decodes that the host does not know yet, from `newest` [slots], into `input_ids` [D].

    slots [D] int64: the decodes' own, on the device.
    """
    if (decodes.token_ids == NO_TOKEN).any():
        input_ids.copy_(torch.where(input_ids == NO_TOKEN, newest[slots], input_ids))


def build_inputs(
    plan: BatchPlan, cache: KVCache, max_lengths: np.ndarray, newest: Tensor, backend: Backend
) -> StepInputs:
    """Tensors of one step, the plan's decodes first; its page changes must have been applied to the cache.

    max_lengths [slots] int64: most positions that each slot's sequence is rotated to; newest [slots] int64, on the
    device: the token that each sampled last. All other numbers are computed on the host and go to the device in one
    piece.
    """
    rows = _ragged_rows(plan, cache, max_lengths) if plan.sequences else _decode_rows(plan.decodes, cache, max_lengths)
    decodes = plan.decodes
    fill_unknown(rows.input_ids[: len(decodes)], rows.slots[: len(decodes)], decodes, newest)
    longest = cache.longest(rows.host_slots, rows.counts)
    page_table, kept = cache.tables(rows.slots, longest)
    context = AttentionContext(
        pool=cache.pool,
        entry_positions=cache.entry_positions,
        page_table=page_table,
        kept=kept,
        query_start=rows.start,
        query_lengths=rows.counts,
        positions=rows.positions,
        destinations=None,
        max_kept=longest,
        visible=rows.visible,
        backend=backend,
    )
    return StepInputs(
        rows.input_ids, rows.rotations, rows.lengths, context, rows.logit_rows, rows.layout, rows.slots, rows.new,
        rows.host_slots, rows.stored,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _StepRows:
    """The numbers of one step, as in `StepInputs` and `AttentionContext`."""

    input_ids: Tensor
    positions: Tensor
    rotations: Tensor
    lengths: Tensor
    slots: Tensor
    new: Tensor
    logit_rows: Tensor
    start: Tensor
    visible: Tensor | None
    layout: LogitLayout
    host_slots: IntArray
    counts: tuple[int, ...]
    """Rows of each sequence."""
    stored: tuple[int, ...]
    """Entries that each keeps."""


def _ragged_rows(plan: BatchPlan, cache: KVCache, max_lengths: np.ndarray) -> _StepRows:
    """Of any step."""
    decodes, others = plan.decodes, plan.sequences
    slots = np.concatenate([decodes.slots, np.array([sequence.slot for sequence in others], np.int32)])
    counts = (1,) * len(decodes) + tuple(len(sequence.token_ids) for sequence in others)
    stored = (1,) * len(decodes) + tuple(0 if part.scratch or part.drafts else len(part.token_ids) for part in others)
    layout = logit_layout(plan)
    rows = np.array(counts, np.int64)
    ids, starts, ends = _rows(plan, rows)
    firsts = ends - rows
    trees = TreeRows.of(plan, firsts, len(ids))
    places = np.arange(len(ids)) if trees is None else np.arange(len(ids)) + trees.shifts
    positions = places + (starts - firsts).repeat(rows)
    rotations = places + (cache.rotary_starts(slots, starts) - firsts).repeat(rows)
    masks = np.empty(0, np.int64) if trees is None else trees.visible
    parts = (ids, positions, rotations, max_lengths[slots].repeat(rows), slots, stored, layout.rows, [0], ends, masks)
    # Every part as int64, so that one transfer takes them all.
    packed = upload(np.concatenate([np.asarray(part, np.int64) for part in parts]), cache.device)
    input_ids, position_rows, rotation_rows, length_rows, slot_rows, new, logit_rows, start, visible = packed.split(
        [len(ids)] * 4 + [len(slots)] * 2 + [len(layout.rows), len(slots) + 1, len(masks)]
    )
    return _StepRows(
        input_ids, position_rows, rotation_rows, length_rows, slot_rows, new.int(), logit_rows, start.int(),
        None if trees is None else visible, layout, slots, counts, stored,
    )  # fmt: skip


def _decode_rows(decodes: Decodes, cache: KVCache, max_lengths: np.ndarray) -> _StepRows:
    """Of a step in which every sequence decodes, most of all steps: most numbers are those of the step before."""
    slots, ones = decodes.slots, (1,) * len(decodes)
    numbers = np.empty((5, len(slots)), np.int64)
    numbers[0], numbers[1] = decodes.token_ids, decodes.starts
    numbers[2], numbers[3], numbers[4] = cache.rotary_starts(slots, decodes.starts), max_lengths[slots], slots
    input_ids, positions, rotations, lengths, slot_rows = upload(numbers, cache.device).unbind()
    logit_rows, start, new = _steady_rows(len(slots), cache.device)
    return _StepRows(
        input_ids, positions, rotations, lengths, slot_rows, new, logit_rows, start, None, _steady_layout(len(slots)),
        slots, ones, ones,
    )  # fmt: skip


@lru_cache(maxsize=64)
def _steady_rows(count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """`logit_rows`, `start` and `new` of so many decodes."""
    rows = torch.arange(count + 1, device=device)
    return rows[:-1], rows.int(), torch.ones(count, dtype=torch.int32, device=device)


@lru_cache(maxsize=64)
def _steady_layout(count: int) -> LogitLayout:
    """Of so many decodes."""
    rows = np.arange(count, dtype=np.int32)
    return LogitLayout(rows, rows, [], [], [], [])


def _rows(plan: BatchPlan, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids [T], first positions [S], and the row after each sequence's last [S], by counts [S]."""
    decodes, others = plan.decodes, plan.sequences
    starts = np.concatenate([decodes.starts, np.array([sequence.start for sequence in others], np.int32)])
    chunks = np.fromiter(chain.from_iterable(sequence.token_ids for sequence in others), np.int32)
    ids = np.concatenate([decodes.token_ids, chunks])
    return ids, starts, counts.cumsum()
