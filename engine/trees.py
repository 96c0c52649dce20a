"""Trees of draft tokens: several continuations of a sequence, verified in one pass (Miao et al. 2024, SpecInfer).

A node is a proposal of a sequence; its row comes after those of the sequence's known tokens, in the order of the
proposals. `parents` says which proposal each node follows, -1: the last known token, the root, which is no node. A node
stands as many positions behind the root as it is deep, and sees what is known, its ancestors and itself. Letters: k
nodes, S sequences, T rows of a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..core.plan import BatchPlan, IntArray, SequencePlan

MASKED_ROWS = 64
"""Rows of a sequence that has a tree: a row's mask is a number of so many bits."""


def depths(parents: Sequence[int]) -> list[int]:
    """[k]: 1 for what follows the root."""
    found: list[int] = []
    for parent in parents:
        found.append(1 if parent < 0 else 1 + found[parent])
    return found


def paths(parents: Sequence[int]) -> list[tuple[int, ...]]:
    """[k]: the nodes from the root to each one, itself included."""
    found: list[tuple[int, ...]] = []
    for node, parent in enumerate(parents):
        found.append((node,) if parent < 0 else (*found[parent], node))
    return found


def first_chain(parents: Sequence[int]) -> list[int]:
    """The nodes from the root to a leaf, of each node's children the first."""
    path, last = list[int](), -1
    for node, parent in enumerate(parents):
        if parent == last:
            path.append(node)
            last = node
    return path


def accepted_tokens(part: SequencePlan, said: Sequence[int]) -> tuple[int, ...]:
    """What a step gives a sequence, by what the target `said` [1 + k] after the root and after each proposal: its
    tokens along the proposals that are the same, and the one that is not.

    What a rejection left undrawn (-1) ends a chain too: the token in its place may happen to be the draft's.
    """
    if part.parents:
        children, tokens, row = _children(part), list[int](), 0
        while True:
            tokens.append(said[row])
            following = children.get((row, said[row]))
            if following is None:
                return tuple(tokens)
            row = following
    drafts, last = part.token_ids[len(part.token_ids) - part.drafts :], 0
    while last < len(drafts) and said[last] == drafts[last] and said[last + 1] >= 0:
        last += 1
    return tuple(said[: last + 1])


def accepted_rows(part: SequencePlan, tokens: Sequence[int]) -> Sequence[int]:
    """Which of a sequence's 1 + k sampled rows, the root's first, gave it the `tokens` of a step."""
    if not part.parents:
        return range(len(tokens))
    children, path = _children(part), [0]
    for token in tokens[:-1]:
        path.append(children[path[-1], token])
    return path


def staying_rows(part: SequencePlan, tokens: Sequence[int]) -> Sequence[int]:
    """Of all rows of a sequence, those whose entries stay once the step gave it `tokens`: none if it gave none."""
    if not tokens:
        return ()
    before = len(part.token_ids) - part.drafts - 1
    if not part.parents:
        return range(before + len(tokens))
    return [*range(before), *(before + row for row in accepted_rows(part, tokens))]


def _children(part: SequencePlan) -> dict[tuple[int, int], int]:
    """Rows by the row before and the token."""
    drafts = part.token_ids[len(part.token_ids) - part.drafts :]
    return {(1 + parent, token): row for row, (parent, token) in enumerate(zip(part.parents, drafts, strict=True), 1)}


def branched(part: SequencePlan) -> int:
    """See `SequenceOutput.branched`."""
    return part.drafts - max(depths(part.parents)) if part.parents else 0


def valid_nodes(tokens: IntArray, parents: IntArray) -> npt.NDArray[np.bool_]:
    """[S, k]: whether each of `tokens` [S, k] follows the root or an earlier one, which no earlier one like it does."""
    order = np.arange(tokens.shape[1])
    alike = (tokens[:, :, None] == tokens[:, None, :]) & (parents[:, :, None] == parents[:, None, :])
    repeated = (alike & (order < order[:, None])).any(2)
    return (parents >= -1) & (parents < order) & ~repeated


@dataclass(frozen=True, slots=True)
class TreeRows:
    """What the rows of a step with trees differ in from those of chains."""

    shifts: npt.NDArray[np.int64]
    """[T], 0 or less: by how much a row's position is less than its place among the sequence's rows says."""
    visible: npt.NDArray[np.int64]
    """[T]: masks as `models.context.AttentionContext` has them."""

    @staticmethod
    def of(plan: BatchPlan, firsts: npt.NDArray[np.int64], num_rows: int) -> "TreeRows | None":
        """firsts [S]: each sequence's first row, the decodes' first; None: there are no trees."""
        trees = [(index, part) for index, part in enumerate(plan.sequences, len(plan.decodes)) if part.parents]
        if not trees:
            return None
        shifts, visible = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.uint64)
        for index, part in trees:
            known = len(part.token_ids) - part.drafts
            first = int(firsts[index]) + known
            rows = slice(first, first + part.drafts)
            shifts[rows] = np.array(depths(part.parents)) - np.arange(1, part.drafts + 1)
            seen = (1 << known) - 1
            visible[rows] = [seen | sum(1 << known + node for node in path) for path in paths(part.parents)]
        return TreeRows(shifts, visible.view(np.int64))
