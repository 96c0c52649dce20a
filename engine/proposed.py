"""`Proposed`: what drafters propose for the sequences of a step that ask, before anybody looks whether it is right."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..core.plan import BatchPlan, IntArray
from ..core.speculation import CaughtUp
from ..speculation.drafter import Proposals
from .trees import valid_nodes


class Asked(NamedTuple):
    """The S sequences of a plan that ask for proposals: some of its decodes, then others."""

    rows: npt.NDArray[np.intp]
    """Which of the decodes, ascending."""
    others: list[int]
    """Which of `BatchPlan.sequences`."""
    slots: IntArray
    """[S]"""
    most: IntArray
    """[S], each at least 1."""
    most_drawn: IntArray
    """[S]: see `Draw.limits`."""
    known: IntArray
    """[S]: tokens known."""

    @staticmethod
    def of(plan: BatchPlan) -> "Asked":
        """Who asks."""
        decodes, empty = plan.decodes, np.empty(0, np.int32)
        rows = np.empty(0, np.intp)
        columns: tuple[IntArray, ...] = (empty,) * 4
        if decodes.drafts is not None and decodes.model_drafts is not None:
            rows = np.flatnonzero(decodes.drafts)
            columns = (decodes.slots, decodes.drafts, decodes.model_drafts, decodes.starts + 1)
            if len(rows) < len(decodes):
                columns = tuple(column[rows] for column in columns)
        others = [index for index, part in enumerate(plan.sequences) if part.drafts]
        if others:
            parts = [plan.sequences[index] for index in others]
            drawn = [part.drafts if part.model_drafts is None else part.model_drafts for part in parts]
            known = [part.start + len(part.token_ids) for part in parts]
            more = ([part.slot for part in parts], [part.drafts for part in parts], drawn, known)
            pairs = zip(columns, more, strict=True)
            columns = tuple(np.concatenate([column, np.array(rest, np.int32)]) for column, rest in pairs)
        return Asked(rows, others, *columns)


@dataclass(frozen=True, slots=True)
class Proposed:
    """For S sequences of a plan, k most tokens of a proposal."""

    asked: Asked
    tokens: IntArray
    """[S, k]"""
    counts: IntArray
    """[S]: how many of them."""
    drew: npt.NDArray[np.bool_]
    """[S]: whether a model drew them."""
    parents: tuple[tuple[int, ...], ...] | None = None
    """[S]: of those that are trees, see `SequencePlan.parents`; None: all are chains."""
    places: IntArray | None = None
    """[S, k]: which row of `scaled` a token was drawn from, -1: from none that matters, nor the rest of its sequence;
    None: so all."""
    scaled: Tensor | None = None
    """[Q, V] float32: as `DraftDistributions` has it."""
    seconds: float = 0.0
    caught_up: CaughtUp = field(default_factory=CaughtUp)


def usable(proposals: Proposals, most: IntArray, vocab_size: int) -> IntArray:
    """[S]: tokens of each proposal, up to the first that is none of the target's or whose place in a tree is none."""
    tokens = proposals.tokens
    wrong = tokens.view(np.uint32) >= vocab_size  # below 0 too
    if proposals.parents is not None:
        wrong |= ~valid_nodes(tokens, proposals.parents)
    first = np.where(wrong.any(1), wrong.argmax(1), tokens.shape[1])
    return np.minimum(np.minimum(first, proposals.counts), most).astype(np.int32)


def shapes(proposals: Proposals, most: IntArray) -> tuple[tuple[tuple[int, ...], ...] | None, npt.NDArray[np.bool_]]:
    """`Proposed.parents`, and [S] which are chains: by what was handed in, which no token that turns out to be unusable
    may change."""
    parents = proposals.parents
    if parents is None:
        return None, np.ones(len(most), np.bool_)
    order = np.arange(parents.shape[1])
    chains = ((parents == order - 1) | (order >= np.minimum(proposals.counts, most)[:, None])).all(1)
    found = tuple(() if chain else tuple(row) for chain, row in zip(chains, parents.tolist(), strict=True))
    return None if chains.all() else found, chains
