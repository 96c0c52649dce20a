"""`Rows`: which tokens a step draws. A sequence with draft tokens has a row for each of them and one more."""

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor, device

from ..core.plan import NO_TOKEN, BatchPlan, IntArray
from ..kernels.sampling import RowMasks
from .grammar import Grammars
from .inputs import LogitLayout
from .slots import SlotTable
from .staging import upload
from .trees import depths, paths


@dataclass(frozen=True, slots=True)
class DraftDistributions:
    """What the draft tokens of a step were drawn from, where they were; Q of them."""

    places: dict[int, IntArray]
    """By sequence of the plan: the row of `scaled` per draft token."""
    scaled: Tensor
    """[Q, V] float32: logits after all the rules of the sequence's parameters, see `kernels.distributions`."""


@dataclass(frozen=True, slots=True)
class Judged:
    """The rows that accept or reject a draft token, instead of being drawn without regard to it; J of them."""

    rows: IntArray
    """[J], ascending: which of the step's."""
    drafts: Tensor
    """[J] int64"""
    scaled: Tensor
    """[J, V] float32: what the tokens were drawn from."""
    heads: Tensor
    """[J] int64: which of the J is the first of the same sequence."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokens to draw, N of them."""

    slots: IntArray
    """[N]"""
    positions: IntArray
    """[N]: where the token is to stand."""
    prefix: Tensor | None = None
    """[N, k] int64, padded with `NO_TOKEN`: draft tokens before it, which penalties must count; None: no need."""
    judged: Judged | None = None
    masks: RowMasks | None = None
    """What grammars allow; None: there are none."""


def sampled_rows(
    plan: BatchPlan, layout: LogitLayout, table: SlotTable, distributions: DraftDistributions | None
) -> Rows:
    """The rows of `layout.sampled`."""
    if not layout.samplers:
        return Rows(plan.decodes.slots, plan.decodes.starts + 1)
    parts = [plan.sequences[index] for index in layout.samplers]
    slots = np.array([part.slot for part in parts], np.int32)
    ends = np.array([part.start + len(part.token_ids) for part in parts], np.int32)
    if not any(layout.drafted):
        return Rows(np.concatenate([plan.decodes.slots, slots]), np.concatenate([plan.decodes.starts + 1, ends]))
    counts = np.array(layout.drafted, np.int32) + 1
    within = np.arange(counts.sum(), dtype=np.int32) - (counts.cumsum() - counts).repeat(counts)
    if any(part.parents for part in parts):
        levels = [[0, *depths(part.parents)] if part.parents else range(1 + part.drafts) for part in parts]
        within = np.concatenate(levels, dtype=np.int32)
    positions = (ends - counts + 1).repeat(counts) + within
    return Rows(
        np.concatenate([plan.decodes.slots, slots.repeat(counts)]),
        np.concatenate([plan.decodes.starts + 1, positions]),
        _prefix(plan, layout, table) if table.penalised[slots].any() else None,
        None if distributions is None else _judged(plan, layout, distributions, table.device),
    )


def bound_rows(rows: Rows, plan: BatchPlan, layout: LogitLayout, grammars: Grammars) -> Rows:
    """The rows with the masks of those whose sequences are bound."""
    parts = [(plan.sequences[index].slot, row, drafts) for index, row, drafts in _first_rows(plan, layout)]
    return replace(rows, masks=grammars.masks([*grammars.bound(plan.decodes.slots), *parts], rows.positions))


def _first_rows(plan: BatchPlan, layout: LogitLayout) -> list[tuple[int, int, tuple[int, ...]]]:
    """(sequence, first row among those drawn, draft tokens) of the layout's samplers."""
    found, row = [], len(plan.decodes)
    for index, count in zip(layout.samplers, layout.drafted, strict=True):
        ids = plan.sequences[index].token_ids
        found.append((index, row, ids[len(ids) - count :]))
        row += 1 + count
    return found


def _prefix(plan: BatchPlan, layout: LogitLayout, table: SlotTable) -> Tensor:
    prefix = np.full((len(layout.sampled), max(layout.drafted)), NO_TOKEN, np.int64)
    for index, row, drafts in _first_rows(plan, layout):
        parents = plan.sequences[index].parents
        if parents:
            for node, path in enumerate(paths(parents), 1):
                prefix[row + node, : len(path)] = [drafts[i] for i in path]
            continue
        for count in range(1, len(drafts) + 1):
            prefix[row + count, :count] = drafts[:count]
    return upload(prefix, table.device)


def _judged(plan: BatchPlan, layout: LogitLayout, distributions: DraftDistributions, on: device) -> Judged | None:
    rows: list[int] = []
    numbers: list[tuple[int, int, int]] = []
    for index, row, drafts in _first_rows(plan, layout):
        places = distributions.places.get(index, ())
        head = len(rows)
        rows.extend(range(row, row + min(len(drafts), len(places))))
        numbers.extend((token, place, head) for token, place in zip(drafts, places, strict=False))
    if not rows:
        return None
    tokens, order, heads = upload(np.array(numbers, np.int64).T.copy(), on)
    return Judged(np.array(rows, np.int32), tokens, distributions.scaled[order], heads)
