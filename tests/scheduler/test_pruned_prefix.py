"""What is left of a pruned context: who begins with it, who owns which of its pages, and when it goes."""

from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
import pytest

from quire.core.ids import RequestId
from quire.core.prefix import Bundle
from quire.core.pruning import PolicyInfo, PruneParams
from quire.core.request import Request
from quire.scheduler.batch import BatchDraft
from quire.scheduler.pruned_prefix import PrunedPrefixes

from .test_prefix import entered
from .world import World, make_config, make_request, step

POLICIES = {"any": PolicyInfo(), "newest": PolicyInfo(observes="newest"), "repeating": PolicyInfo(repeats=True)}
CONTEXT = 14


def world_of(**changes: Any) -> World:
    return World(make_config(policies=POLICIES, **changes))


def about(
    name: str, tail: Iterable[int] = (40, 41, 42), *, max_tokens: int = 6, cache_ttl: float = 0.0, **changes: Any
) -> Request:
    """A question behind a document, half of which stays."""
    values: dict[str, Any] = {"policy": "any", "floor": 3, "window": 1, "sinks": 1, "every": 0, "context": CONTEXT}
    prune = PruneParams(**values | changes)
    plain = make_request(name, [*range(1, prune.context + 1), *tail], max_tokens=max_tokens)
    return msgspec.structs.replace(plain, prune=prune, repeat_ids=(7, 7), cache_ttl=cache_ttl)


def run(world: World, request: Request) -> int:
    """To its end; returns how many prompt tokens it found."""
    world.scheduler.add(request)
    world.run()
    return world.sequences[request.id, 0].cached_tokens


def pruned_prefixes(world: World) -> list[Bundle]:
    return [bundle for bundle in world.scheduler._cache._index if bundle.kept is not None]


def crowd(world: World, name: str = "crowd") -> None:
    """Requests that need the whole pool."""
    for number in range(3):
        world.scheduler.add(make_request(f"{name}{number}", range(20, 44), max_tokens=20, seed=number))
    world.run()


@pytest.mark.parametrize("policy", ["any", "repeating"])
def test_the_next_request_begins_with_what_is_left(policy: str):
    world = world_of()
    assert run(world, about("a", policy=policy)) == 0
    (bundle,) = pruned_prefixes(world)
    prunes = world.engine.compactions
    world.scheduler.add(about("b", policy=policy))
    plan = step(world)
    (assignment,) = plan.assignments
    assert bundle.kept is not None and bundle.pages is not None and assignment.kept is not None
    assert assignment.cached == CONTEXT and np.array_equal(assignment.kept, bundle.kept)
    assert plan.sequences[0].token_ids == (40, 41, 42) and not plan.sequences[0].scratch
    partial = int(np.count_nonzero(bundle.kept % 4))
    assert len(plan.duplicates.targets) == partial
    assert len(set(plan.shares.pages) & set(bundle.pages)) == len(bundle.pages) - partial
    world.run()
    assert world.tokens["b", 0] == world.tokens["a", 0], "the same seed, question and entries"
    assert world.engine.compactions == prunes
    stats = world.scheduler.stats()
    assert stats.prefix_pruned_hits_total == stats.prefix_hits_total == CONTEXT
    assert world.sequences["b", 0].cached_tokens == CONTEXT


def test_those_that_come_together_wait_for_the_first():
    world = world_of()
    for name in "abc":
        world.scheduler.add(about(name, max_tokens=9))
    began = []
    while world.scheduler.has_work:
        began.append(entered(step(world)))
    assert [cached for cached in began if cached] == [[0], [CONTEXT, CONTEXT]]
    assert began[1] == [], "the plan that fills the pages is not the one that reads them"
    assert world.scheduler.stats().prunes["any"].prunes == {"prompt": 1}


def test_of_two_that_prune_it_only_one_publishes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(PrunedPrefixes, "awaits", lambda *_: False)
    world = world_of(max_batch_tokens=40)
    for name, tail in (("a", (40, 41)), ("b", (42,))):
        world.scheduler.add(about(name, tail))
    step(world)
    step(world)
    first, second = world.scheduler._running
    assert [pruned_prefixes(world)] == [[first.base]] and second.base not in pruned_prefixes(world)
    world.run()
    assert world.scheduler.stats().prunes["any"].prunes == {"prompt": 2}


def test_users_that_prune_again_move_away_and_leave_it():
    world = world_of()
    for name in "abc":
        world.scheduler.add(about(name, max_tokens=12, every=3))
    world.run()
    assert world.scheduler.stats().prunes["any"].prunes["decode"] >= 6
    assert run(world, about("d", every=3)) == CONTEXT
    assert world.engine.began_pruned == 3


def test_it_is_reclaimed_whole_when_the_room_is_needed():
    world = world_of(num_pages=26)
    run(world, about("a"))
    (bundle,) = pruned_prefixes(world)
    assert world.scheduler.stats().pages_cached >= bundle.size
    crowd(world)
    assert not pruned_prefixes(world)
    assert run(world, about("b")) == 0


def test_pinned_it_stays_and_counts_its_pages():
    world = world_of(num_pages=34)
    run(world, about("a", cache_ttl=60.0))
    (bundle,) = pruned_prefixes(world)
    assert world.sequences["a", 0].pinned_tokens == CONTEXT
    assert world.scheduler.stats().pages_pinned == bundle.size
    crowd(world)
    world.clock.now = 50.0
    assert run(world, about("b", cache_ttl=30.0)) == CONTEXT
    world.clock.now = 79.0
    crowd(world, "second")
    assert pruned_prefixes(world) == [bundle] and world.scheduler.stats().pages_pinned == bundle.size
    world.clock.now = 81.0
    assert world.scheduler.stats().pages_pinned == 0
    crowd(world, "third")
    assert not pruned_prefixes(world)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_aborted_while_it_publishes(steps: int):
    world = world_of()
    world.scheduler.add(about("a"))
    for _ in range(steps):
        step(world)
    world.step(between=lambda: world.scheduler.abort(RequestId("a")))
    world.run()
    assert bool(pruned_prefixes(world)) == (steps >= 1), "what was pruned and moved is there to stay"
    assert run(world, about("b")) == (CONTEXT if steps else 0)


def test_preempted_by_the_plan_that_would_publish_it_leaves_nothing():
    world = world_of()
    world.scheduler.add(about("a"))
    step(world)
    scheduler, draft = world.scheduler, BatchDraft(32)
    (sequence,) = scheduler._pruning.compact(draft)
    assert sequence.base is not None and not pruned_prefixes(world), "not before the plan is made"
    scheduler._preempt(sequence, True)
    draft.forget(sequence)
    assert not len(scheduler._cache.pruned.take().targets) and not pruned_prefixes(world)
    scheduler.check_integrity()
    world.run()
    assert len(pruned_prefixes(world)) == 1 and len(world.tokens["a", 0]) == 6


def test_a_preempted_user_begins_again_with_it_and_forgets_the_same():
    world = world_of()
    run(world, about("a"))
    world.scheduler.add(about("b"))
    for _ in range(3):
        step(world)
    world.scheduler._preempt(world.scheduler._running[0])
    assert entered(step(world)) == [CONTEXT]
    world.run()
    assert world.tokens["b", 0] == world.tokens["a", 0]
    assert world.scheduler.stats().lossy_preemptions_total == 0
    world.scheduler.add(about("c"))
    step(world)
    world.scheduler._preempt(world.scheduler._running[0])
    world.scheduler._cache.reclaim_all()
    world.run()
    assert world.scheduler.stats().lossy_preemptions_total == 1, "what it began with is gone"


LONG: dict[str, Any] = {"num_pages": 16, "max_model_len": 32, "max_batch_tokens": 16}
"""A pool that just holds a sequence of 32 tokens unpruned."""


def test_alone_in_the_pool_it_takes_its_prefix_for_itself():
    world = world_of(**LONG)
    world.scheduler.add(about("a", (40, 41), max_tokens=14, context=16, keep=0.95))
    shared = set()
    while world.scheduler.has_work:
        step(world)
        shared |= {sequence.base is not None for sequence in world.scheduler._running}
    assert shared == {True, False} and not pruned_prefixes(world)
    assert len(world.tokens["a", 0]) == 14


def test_who_does_not_fit_beside_it_computes_its_context():
    world = world_of(**LONG)
    run(world, about("a", (40, 41), max_tokens=1, context=16, keep=0.95))
    assert pruned_prefixes(world)
    assert run(world, about("b", range(20, 35), max_tokens=1, context=16, keep=0.95)) <= 12
    assert len(world.tokens["b", 0]) == 1


def test_admission_counts_what_it_saves():
    """Beside the first, which decodes, there is no room for the context unpruned."""
    world = world_of(num_pages=22, max_model_len=40)
    world.scheduler.add(about("a", max_tokens=8, context=24, keep=0.5))
    for _ in range(4):
        step(world)
    world.scheduler.add(make_request("plain", [9, *range(2, 25)], max_tokens=4))
    assert entered(step(world)) == []
    world.scheduler.abort(RequestId("plain"))
    world.scheduler.add(about("b", max_tokens=4, context=24, keep=0.5))
    assert entered(step(world)) == [24]
    world.run()


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({"context": 0}, {}),
        ({"when": "pressure"}, {}),
        ({"keep": 1.0}, {}),
        ({"policy": "newest", "every": 4}, {}),
        ({"policy": "newest"}, {"prunes_under_pressure": True}),
        ({}, {"prefix_cache": False}),
        ({}, {"windows": (None, 9)}),
    ],
)
def test_what_is_not_for_others(changes: dict[str, Any], config: dict[str, Any]):
    world = world_of(**config)
    for name in "ab":
        run(world, about(name, range(30, 35), **changes))
        assert not pruned_prefixes(world)
    assert world.scheduler.stats().prefix_pruned_hits_total == 0
