"""Who gives way to the head of the queue, under a policy that lets it take pages."""

from .cache_manager import CacheManager
from .policy import Policy, position
from .sequence import SequenceState
from .waiting import WaitingQueue


def giving_way(
    waiting: WaitingQueue, running: list[SequenceState], policy: Policy, cache: CacheManager
) -> list[SequenceState]:
    """The last in line of those that the queue's head outranks, as many as make room for it; none if all are too few.

    Only those that can be recomputed exactly.

    Pages that a victim shares count as if they came back: then the next step takes one victim more.
    """
    head = waiting.first() if policy.takes_pages else None
    if head is None:
        return []
    victims = [
        sequence
        for sequence in running
        if sequence.is_exact and not sequence.in_flight and policy.outranks(head, sequence)
    ]
    if not victims:
        return []
    victims.sort(key=lambda sequence: position(policy, sequence), reverse=True)
    lacking = cache.cost(head, cache.find(head)) + cache.owed(running) + cache.watermark - cache.available
    chosen = []
    for victim in victims:
        if lacking <= 0:
            break
        lacking -= victim.table.num_pages + cache.owed([victim])
        chosen.append(victim)
    return chosen if lacking <= 0 else []
