"""`BatchDraft`: a step's plan while it is being put together."""

from dataclasses import replace

import numpy as np

from ..core.plan import (
    BatchPlan,
    Compaction,
    Decodes,
    IntArray,
    PageDrop,
    PageDuplicates,
    PageGrants,
    PruneOrder,
    SequencePlan,
    SlotAssignment,
)
from .sequence import SequenceState
from .swap import Swaps


class BatchDraft:
    """Collects the parts of one `BatchPlan`."""

    def __init__(self, budget: int, steps: int = 1) -> None:
        """steps: in flight once this one is, in all of which its steady decodes take part."""
        self.budget = budget
        """Tokens the step can still take."""
        self._steps = steps
        self.owed = 0
        """Pages that begun prompts of this step will yet need: not for new sequences."""
        self.members: list[SequenceState] = []
        """Who is in the step, aligned with the plan's sequences."""
        self.decoders: list[SequenceState] = []
        """Who else is in the step, aligned with the plan's decodes."""
        self.plans: list[SequencePlan] = []
        """What each of the `members` computes."""
        self.decodes = Decodes.none()
        self._promised = 0
        """How many of them were promised their place."""
        self.relief = 0
        """Pages that the step's prunes will make available to the next one."""
        self.reserved = 0
        """Pages for which sequences wait that were promised them."""
        self.compactions: dict[SequenceState, Compaction] = {}
        self.prunes: dict[SequenceState, PruneOrder] = {}
        self.foresee = False
        """Whether to find out what n-grams would propose after it."""
        self.waiting: set[SequenceState] = set()
        """Who runs, but lacks pages for this step."""
        self.entered: dict[SequenceState, SlotAssignment] = {}
        """Who has just got a slot."""
        self._drops: list[PageDrop] = []
        self._grants: list[PageGrants] = []
        self._shares: dict[SequenceState, PageGrants] = {}

    @property
    def size(self) -> int:
        """Sequences in the step."""
        return len(self.members) + len(self.decoders)

    @property
    def is_empty(self) -> bool:
        """Whether the engine would have nothing to do."""
        return not (self.size or self.prunes or self.compactions or self._drops or self.entered)

    def enter(self, sequence: SequenceState) -> None:
        """The sequence has just got its slot; it begins with what is in its table."""
        self.entered[sequence] = sequence.assignment()
        if sequence.table.num_pages:
            rows, columns, pages = sequence.table.places()
            self._shares[sequence] = PageGrants(np.full_like(rows, sequence.slot), rows, columns, pages)

    def promise(self, sequence: SequenceState) -> None:
        """A steady decode will be in this step: it got pages for it, which nobody may take back."""
        sequence.in_flight = self._steps
        self.budget -= 1
        self._promised += 1

    def decode(self, decodes: Decodes, decoders: list[SequenceState]) -> None:
        """The steady decodes of the step, promised ones among them."""
        self.budget -= len(decoders) - self._promised
        self.decodes, self.decoders = decodes, decoders
        for sequence in decoders:
            sequence.in_flight = self._steps

    def add_columns(self, sequences: list[SequenceState], columns: list[int], ids: IntArray) -> None:
        """Each head of the sequences' tables gets one page of `ids` [len(sequences) * R], in the columns given."""
        count = len(ids) // len(sequences)
        slots = np.array([sequence.slot for sequence in sequences], np.int32).repeat(count)
        rows = np.broadcast_to(np.arange(count, dtype=np.int32), (len(sequences), count)).ravel()
        self._grants.append(PageGrants(slots, rows, np.array(columns, np.int32).repeat(count), ids))

    def change_pages(self, sequence: SequenceState, drops: list[tuple[IntArray, int]], grants: PageGrants) -> None:
        """The sequence's table loses leading pages `drops` (rows, pages per row), then gets `grants`."""
        assert sequence.slot is not None
        self._drops += [PageDrop(sequence.slot, rows, pages) for rows, pages in drops]
        if len(grants.pages):
            self._grants.append(grants)

    def wait(self, sequence: SequenceState, drops: list[tuple[IntArray, int]]) -> None:
        """The sequence lacks pages for this step, and lost the leading pages `drops` (rows, pages per row)."""
        self.waiting.add(sequence)
        self.change_pages(sequence, drops, PageGrants.none())

    def forget(self, sequence: SequenceState) -> None:
        """The sequence, which is not in the step, has just lost its slot."""
        self.entered.pop(sequence, None)
        self._shares.pop(sequence, None)
        self.compactions.pop(sequence, None)
        self.prunes.pop(sequence, None)

    def add(self, sequence: SequenceState, part: SequencePlan) -> None:
        """The sequence computes its `part` in this step."""
        sequence.in_flight = len(part.token_ids)
        self.budget -= sequence.in_flight
        self.members.append(sequence)
        self.plans.append(part)

    def extend(self, place: int, drafts: int, model_drafts: int) -> None:
        """The member at `place` drafts, too."""
        self.plans[place] = replace(self.plans[place], drafts=drafts, model_drafts=model_drafts)
        self.members[place].in_flight += drafts
        self.budget -= drafts

    def draft(self, decodes: Decodes) -> None:
        """Of the steady decodes some draft, too: as `decodes` says, of the same rows."""
        assert decodes.drafts is not None
        self.decodes = decodes
        self.budget -= int(decodes.drafts.sum())
        for sequence, drafts in zip(self.decoders, decodes.drafts.tolist(), strict=True):
            sequence.in_flight = 1 + drafts

    def build(self, swaps: Swaps, duplicates: PageDuplicates) -> BatchPlan:
        """The finished plan, with what travels between device and host, and what is copied on the device."""
        return BatchPlan(
            tuple(self.plans),
            assignments=tuple(self.entered.values()),
            drops=tuple(self._drops),
            grants=_joined(self._grants),
            shares=_joined(list(self._shares.values())),
            decodes=self.decodes,
            parks=swaps.parks,
            unparked=swaps.unparked,
            swap_outs=swaps.outs,
            swap_ins=swaps.ins,
            duplicates=duplicates,
            compactions=tuple(self.compactions.values()),
            prunes=tuple(self.prunes.values()),
            foresee=self.foresee,
        )


def _joined(grants: list[PageGrants]) -> PageGrants:
    if len(grants) <= 1:
        return grants[0] if grants else PageGrants.none()
    columns = zip(*((g.slots, g.rows, g.columns, g.pages) for g in grants), strict=True)
    return PageGrants(*(np.concatenate(parts) for parts in columns))
