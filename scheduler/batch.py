"""`BatchDraft`: a step's plan while it is being put together."""

import numpy as np

from ..core.plan import (
    BatchPlan,
    Compaction,
    IntArray,
    PageDrop,
    PageGrants,
    PruneOrder,
    SequencePlan,
    SlotAssignment,
)
from .sequence import SequenceState


class BatchDraft:
    """Collects the parts of one `BatchPlan`."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        """Tokens the step can still take."""
        self.owed = 0
        """Pages that begun prompts of this step will yet need: not for new sequences."""
        self.members: list[SequenceState] = []
        """Who is in the step, aligned with the plan's sequences."""
        self.promised = 0
        """Pages that the step's prunes will make available to the next one."""
        self.reserved = 0
        """Pages for which sequences wait that were promised them."""
        self.compactions: dict[SequenceState, Compaction] = {}
        self.prunes: dict[SequenceState, PruneOrder] = {}
        self._plans: list[SequencePlan] = []
        self._assignments: list[SlotAssignment] = []
        self._drops: list[PageDrop] = []
        self._grants: list[PageGrants] = []
        self._shares: list[PageGrants] = []

    def enter(self, sequence: SequenceState, shared: IntArray) -> None:
        """The sequence has just got its slot; its table begins with the pages `shared` [R, C]."""
        self._assignments.append(sequence.assignment())
        if shared.size:
            rows, columns = np.indices(shared.shape, np.int32).reshape(2, -1)
            self._shares.append(PageGrants(np.full_like(rows, sequence.slot), rows, columns, shared.ravel()))

    def change_pages(self, sequence: SequenceState, drops: list[tuple[IntArray, int]], grants: PageGrants) -> None:
        """The sequence's table loses leading pages `drops` (rows, pages per row), then gets `grants`."""
        assert sequence.slot is not None
        self._drops += [PageDrop(sequence.slot, rows, pages) for rows, pages in drops]
        if len(grants.pages):
            self._grants.append(grants)

    def forget(self, sequence: SequenceState) -> None:
        """The sequence, which is not in the step, has just lost its slot."""
        self.compactions.pop(sequence, None)
        self.prunes.pop(sequence, None)

    def add(self, sequence: SequenceState, part: SequencePlan) -> None:
        """The sequence computes its `part` in this step."""
        sequence.in_flight = len(part.token_ids)
        self.budget -= sequence.in_flight
        self.members.append(sequence)
        self._plans.append(part)

    def build(self) -> BatchPlan:
        """The finished plan."""
        return BatchPlan(
            tuple(self._plans),
            tuple(self._assignments),
            tuple(self._drops),
            _joined(self._grants),
            _joined(self._shares),
            tuple(self.compactions.values()),
            tuple(self.prunes.values()),
        )


def _joined(grants: list[PageGrants]) -> PageGrants:
    if len(grants) <= 1:
        return grants[0] if grants else PageGrants.none()
    columns = zip(*((g.slots, g.rows, g.columns, g.pages) for g in grants), strict=True)
    return PageGrants(*(np.concatenate(parts) for parts in columns))
