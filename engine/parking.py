"""What the engine puts away with a swapped-out sequence, beside its pages: state that belongs to its slot."""

from typing import Protocol

from ..core.ids import SlotId
from ..core.plan import BatchPlan


class SlotKeeper(Protocol):
    """Owner of per-slot state that no plan can rebuild (sampling state is not of that kind: token ids give it back)."""

    def park(self, slot: SlotId) -> object:
        """A copy of the slot's state, in host memory where it is large; the slot may be assigned anew at once."""
        ...

    def unpark(self, slot: SlotId, state: object) -> None:
        """Give the state of `park` to a slot that was just assigned."""
        ...


class Parking:
    """States of swapped-out sequences by ticket."""

    def __init__(self, *keepers: SlotKeeper) -> None:
        self._keepers = keepers
        self._states: dict[int, list[object]] = {}

    def leave(self, plan: BatchPlan) -> None:
        """Put away the slots that the plan parks, forget what it does; before the plan's assignments."""
        for park in plan.parks:
            self._states[park.ticket] = [keeper.park(park.slot) for keeper in self._keepers]
        for ticket in plan.unparked:
            self._states.pop(ticket, None)

    def come_back(self, plan: BatchPlan) -> None:
        """Give restored sequences their state; after the plan's assignments."""
        for assignment in plan.assignments:
            if assignment.restored is not None:
                states = self._states.pop(assignment.restored.ticket)
                for keeper, state in zip(self._keepers, states, strict=True):
                    keeper.unpark(assignment.slot, state)

    def __len__(self) -> int:
        return len(self._states)
