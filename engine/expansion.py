"""`Expansion`: a plan with its proposals, in which each sequence that has some is a `SequencePlan`, and the way back.

So whatever knows plans knows drafts: graphs, trees, grammars, policies that look on, networks of any kind. In such a
plan, and wherever a step is computed, a sequence's `token_ids` end with its proposals, `drafts` says how many they are,
and `model_drafts` how many of them a model drew.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..core.plan import NO_TOKEN, BatchPlan, Decodes, IntArray, Runs, SequenceOutput, SequencePlan
from .proposed import Proposed
from .rows import DraftDistributions

WithProposal = Callable[[SequencePlan, tuple[int, ...], tuple[int, ...], bool], SequencePlan]
"""A sequence's part with its proposal: tokens, parents, and whether a model drew it."""


@dataclass(frozen=True, slots=True)
class Expansion:
    """Letters as in `core.plan`."""

    whole: BatchPlan
    """As it was asked for."""
    plan: BatchPlan
    """Its first sequences are the decodes that ask for proposals; its decodes are the others."""
    distributions: DraftDistributions | None
    rows: npt.NDArray[np.intp]
    """Which decodes these first sequences are."""
    rest: npt.NDArray[np.intp]
    """Which the others are."""

    @staticmethod
    def of(plan: BatchPlan, proposed: Proposed, with_proposal: WithProposal) -> "Expansion":
        """Of a plan and what is proposed for it."""
        asked, decodes = proposed.asked, plan.decodes
        rest = np.setdiff1d(np.arange(len(decodes)), asked.rows, assume_unique=True)
        sequences = [*plan.decode_parts(asked.rows), *plan.sequences]
        indices = [*range(len(asked.rows)), *(len(asked.rows) + index for index in asked.others)]
        parents = proposed.parents or ((),) * len(indices)
        found = zip(indices, proposed.tokens.tolist(), proposed.counts.tolist(), parents, proposed.drew, strict=True)
        for index, tokens, count, of_tokens, drew in found:
            sequences[index] = with_proposal(sequences[index], tuple(tokens[:count]), of_tokens[:count], bool(drew))
        others = Decodes(decodes.slots[rest], decodes.starts[rest], decodes.token_ids[rest])
        expanded = replace(plan, sequences=tuple(sequences), decodes=others)
        return Expansion(plan, expanded, _distributions(proposed, indices), asked.rows, rest)

    def fold(
        self, decoded: IntArray, outputs: Sequence[SequenceOutput], apart: Mapping[int, SequenceOutput]
    ) -> tuple[IntArray, Runs | None, tuple[SequenceOutput, ...], dict[int, SequenceOutput]]:
        """`StepOutput.decoded`, `runs`, outputs of the sequences and `apart` of the plan as it was, by those of the
        expanded one."""
        if not len(self.rows):
            return decoded, None, tuple(outputs), dict(apart)
        own, count = outputs[: len(self.rows)], len(self.rows) + len(self.rest)
        width = max(1, *(len(output.token_ids) for output in own))
        ids, numbers = np.full((count, width), NO_TOKEN, np.int32), np.zeros((4, count), np.int32)
        ids[self.rest, 0], numbers[0, self.rest] = decoded, decoded != NO_TOKEN
        for row, output in zip(self.rows.tolist(), own, strict=True):
            ids[row, : len(output.token_ids)] = output.token_ids
            numbers[:, row] = len(output.token_ids), output.drafted, output.model_drafted, output.branched
        newest = ids[np.arange(count), numbers[0] - 1]
        told = {int(self.rest[row]): output for row, output in apart.items()}
        for row, output in zip(self.rows.tolist(), own, strict=True):
            if output.error or output.forced or output.ended:
                told[row] = output
        return newest, Runs(ids, *numbers), tuple(outputs[len(self.rows) :]), told

    def fold_recorded(
        self, recorded: Mapping[int, tuple[bytes, ...]], outputs: Sequence[SequenceOutput]
    ) -> dict[int, tuple[bytes, ...]]:
        """The same of `StepOutput.recorded`; outputs: of the expanded plan's sequences."""
        found = {int(self.rest[row]): rows for row, rows in recorded.items()}
        own = zip(self.rows.tolist(), outputs, strict=False)
        return found | {row: output.recorded for row, output in own if output.recorded}


def _distributions(proposed: Proposed, indices: list[int]) -> DraftDistributions | None:
    if proposed.places is None or proposed.scaled is None:
        return None
    counts = (proposed.places >= 0).sum(1)
    rows = zip(indices, proposed.places, counts, strict=True)
    return DraftDistributions({index: row[:count] for index, row, count in rows if count}, proposed.scaled)


def without_proposals(part: SequencePlan) -> SequencePlan:
    """The sequence's part of a step as if nothing had been proposed."""
    return replace(part, token_ids=part.token_ids[: len(part.token_ids) - part.drafts], drafts=0, parents=())


def unspeculative(plan: BatchPlan) -> BatchPlan:
    """The plan where nobody proposes anything."""
    decodes = Decodes(plan.decodes.slots, plan.decodes.starts, plan.decodes.token_ids)
    others = tuple(replace(part, drafts=0) if part.drafts else part for part in plan.sequences)
    return replace(plan, decodes=decodes, sequences=others)
