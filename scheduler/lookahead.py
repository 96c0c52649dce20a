"""Planning ahead: whether the step after the one in flight can be decided before its results are known.

It can while all that runs decodes steadily: then the next step is the same again, one token further, whatever the
tokens are. Who turns out to have ended by the step in flight is in the next one too; what it gives there is dropped.
"""

from ..core.plan import BatchPlan
from .cache_manager import CacheManager
from .decodes import DecodeBatch
from .policy import Policy
from .sequence import SequenceState
from .waiting import WaitingQueue


def only_decodes(plan: BatchPlan, decodes: DecodeBatch, running: list[SequenceState]) -> bool:
    """Whether the plan in flight decodes everyone who runs on, and its results tell nothing but a token of each.

    Ended sequences hold their slots until their last step is committed, but do not run on. What is bound to a grammar
    must know its token first.
    """
    if plan.sequences or plan.prunes or plan.asks_drafts or decodes.bound or not decodes.take_part(plan.decodes):
        return False
    return len(running) == len(decodes) or all(sequence.done or sequence.steady for sequence in running)


def may_enter(
    waiting: WaitingQueue, running: list[SequenceState], policy: Policy, cache: CacheManager, free_slots: int
) -> bool:
    """Whether the head of the queue could get a place in the step after the one in flight."""
    head = waiting.first()
    if head is None:
        return False
    # An ended sequence gives its slot back as soon as the step in flight is committed.
    if any(sequence.done or (policy.takes_pages and policy.outranks(head, sequence)) for sequence in running):
        return True
    return free_slots > 0 and cache.cost(head, cache.find(head)) + cache.watermark <= cache.available
