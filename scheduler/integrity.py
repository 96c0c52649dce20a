"""What must hold of the scheduler's lists between any two calls; each check passes over all of them."""

from collections.abc import Iterable

from ..core.ids import SlotId
from .config import SchedulerConfig
from .sequence import SequenceState


def check_running(
    running: list[SequenceState], free_slots: list[SlotId], flying: list[SequenceState], config: SchedulerConfig
) -> None:
    """AssertionError unless slots are held once and those in flight run; `flying`: who is in the plans in flight."""
    slots = [sequence.slot for sequence in running] + free_slots
    assert sorted(slot for slot in slots if slot is not None) == list(range(config.max_num_seqs))
    assert flying == [sequence for sequence in flying if sequence in running and sequence.in_flight]
    for sequence in running:
        sequence.check(config)
        assert not sequence.done or sequence.in_flight, "an ended sequence still holds a slot"
        assert not sequence.in_flight or sequence in flying
        assert sequence.in_flight or sequence.steady == sequence.decodes_plainly


def check_queue(
    waiting: Iterable[SequenceState], running: Iterable[SequenceState], requests: Iterable[list[SequenceState]]
) -> None:
    """AssertionError unless who waits holds nothing and every unfinished choice is in exactly one list."""
    waiting = list(waiting)
    for sequence in waiting:
        assert sequence.slot is None and not sequence.table.num_pages and not sequence.num_computed
        assert not sequence.blocks
    alive = {sequence.arrival for sequences in requests for sequence in sequences}
    held = [sequence.arrival for sequence in [*running, *waiting] if not sequence.done]
    assert len(held) == len(alive) and set(held) == alive, "requests and queues disagree"
