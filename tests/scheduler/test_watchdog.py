"""Faults of the scheduler itself: one request ends with an error, the others go on; leaked pages come back."""

import logging

import pytest

from quire.core.errors import GenerationError, revive
from quire.core.ids import RequestId
from quire.scheduler.policy import Policy
from quire.scheduler.sequence import SequenceState
from quire.scheduler.watchdog import Watchdog

from .world import World, make_config, make_request


class _LastCome(Policy):
    """A broken policy: the youngest first."""

    def rank(self, sequence: SequenceState) -> float:
        return -sequence.arrival


def watched(world: World, **limits: float) -> Watchdog:
    """Give the world a watchdog of these limits."""
    watchdog = world.scheduler._oversight.watchdog = Watchdog(**limits)  # type: ignore[arg-type]
    return watchdog


def test_a_policy_that_starves_a_request_is_found_out(caplog):
    world = World(make_config(max_num_seqs=1, max_waiting=1000))
    world.scheduler._policy = world.scheduler._waiting._policy = _LastCome()
    watched(world, patience=10.0, overtakings=20)
    world.scheduler.add(make_request("busy"))
    world.step()
    world.scheduler.add(make_request("starved"))
    for number in range(150):
        world.clock.now += 1.0
        world.scheduler.add(make_request(f"r{number}", max_tokens=1))
        with caplog.at_level(logging.ERROR, "quire.scheduler"):
            world.step()
        if world.failed:
            break
    assert list(world.failed) == ["starved"]
    error = revive(world.failed["starved"].error)
    assert type(error) is GenerationError and "the scheduler is stuck: 20 others" in error.message
    assert "request starved is stuck (overtaken)" in caplog.text
    assert world.scheduler.stats().watchdog_total == {"overtaken": 1}
    world.run()
    assert list(world.failed) == ["starved"]


def test_long_queues_and_urgent_floods_are_no_fault():
    for policy in ("fcfs", "priority", "fair", "sjf"):
        world = World(make_config(policy=policy, max_num_seqs=1, max_waiting=1000))
        watched(world, patience=30.0, overtakings=3)
        for number in range(60):
            world.scheduler.add(make_request(f"old{number}", tenant="flood", max_tokens=2, priority=2))
        for number in range(100):
            world.clock.now += 1.0
            world.scheduler.add(make_request(f"r{number}", tenant=f"t{number % 3}", max_tokens=1))
            world.step()
        world.run()
        assert not world.failed, policy


def test_a_running_sequence_that_no_step_works_on_is_found_out(monkeypatch):
    world = World(make_config())
    watched(world, idle_steps=5)
    world.scheduler.add(make_request("forgotten", max_tokens=20, logprobs=0))
    world.scheduler.add(make_request("other", max_tokens=20))
    world.step()
    forgotten = world.scheduler._running[0]
    proceed = world.scheduler._continue
    monkeypatch.setattr(world.scheduler, "_continue", lambda s, draft: s is forgotten or proceed(s, draft))
    world.run()
    assert "no step worked on it for 5 steps" in revive(world.failed["forgotten"].error).message
    assert world.scheduler.stats().watchdog_total == {"stalled": 1}
    assert len(world.tokens["other", 0]) == 20 and len(world.tokens["forgotten", 0]) == 1


def test_work_that_cannot_be_planned_ends_one_request_at_a_time(monkeypatch):
    world = World(make_config())
    world.scheduler.add(make_request("impossible"))
    world.scheduler.add(make_request("other", prompt=(1,)))
    cost = world.scheduler._cache.cost
    monkeypatch.setattr(
        world.scheduler._cache,
        "cost",
        lambda s, hits: 10**6 if s.request.id == "impossible" else cost(s, hits),
    )
    assert world.scheduler.plan() is None and world.scheduler.has_work
    world.run()
    assert list(world.failed) == ["impossible"] and list(world.finished) == [("other", 0)]
    assert world.scheduler.stats().watchdog_total == {"unplannable": 1}


def test_a_leaked_page_is_found_when_idle_and_taken_back(caplog):
    world = World(make_config())
    world.scheduler.add(make_request(prompt=range(1, 18)))
    world.step()
    world.scheduler._cache.take(3)
    assert world.scheduler.reclaim_leaks() == 0, "somebody runs"
    while world.scheduler.has_work:
        plan = world.scheduler.plan()
        assert plan is not None
        world.scheduler.commit(plan, world.engine.step(plan))
    with caplog.at_level(logging.ERROR, "quire.scheduler"):
        assert world.scheduler.reclaim_leaks() == 3
    assert "3 KV pages belonged to nobody" in caplog.text
    assert world.scheduler.reclaim_leaks() == 0
    stats = world.scheduler.stats()
    assert (stats.page_leaks_total, stats.pages_used) == (3, 0) and stats.pages_cached == 10
    world.scheduler.check_integrity()
    again = make_request("again", prompt=range(1, 18))
    world.scheduler.add(again)
    world.run()
    assert world.sequences["again", 0].cached_tokens == 16, "kept prefixes stay"


def test_a_prefix_whose_users_were_miscounted_is_taken_back():
    world = World(make_config())
    world.scheduler.add(make_request(prompt=range(1, 18), max_tokens=1))
    world.run()
    bundle = next(iter(world.scheduler._cache._index))
    world.scheduler._cache._index.acquire(bundle)
    assert bundle.pages is not None and world.scheduler.reclaim_leaks() == len(bundle.pages)
    world.scheduler.check_integrity()
    world.check_idle()


def test_a_leak_that_blocks_the_queue_is_repaired_instead_of_ending_requests():
    world = World(make_config(num_pages=20))
    world.scheduler._cache.take(18)
    world.scheduler.add(make_request(prompt=range(1, 10)))
    assert world.scheduler.plan() is None
    world.run()
    assert list(world.finished) == [("r", 0)] and not world.failed


def test_limits_hold_where_a_step_has_no_tokens_to_spare():
    watchdog = Watchdog(idle_steps=2)
    world = World(make_config())
    world.scheduler.add(make_request())
    world.step()
    for spare in (0, 0, 0, 1):
        watchdog.planned(world.scheduler._running, 0, spare)
    assert watchdog.verdicts() == []
    watchdog.planned(world.scheduler._running, 0, 1)
    assert [verdict.reason for verdict in watchdog.verdicts()] == ["stalled"]
    world.scheduler.abort(RequestId("r"))


@pytest.mark.parametrize("choices", [1, 3])
def test_waiting_tokens_are_capped_and_one_long_prompt_is_still_taken(choices):
    from quire.core.errors import OverloadedError

    world = World(make_config(max_waiting_tokens=30, max_num_seqs=1, max_model_len=200, num_pages=400))
    world.scheduler.add(make_request("long", prompt=range(40), n=choices))
    assert world.scheduler.stats().waiting_tokens == 40 * choices
    with pytest.raises(OverloadedError, match=f"{40 * choices} prompt tokens wait") as caught:
        world.scheduler.add(make_request("more"))
    assert caught.value.retry_after == 1.0
    world.run()
    world.scheduler.add(make_request("a", prompt=range(20), max_tokens=4))
    for _ in range(5):
        world.clock.now += 2.0
        world.step()
    world.scheduler.add(make_request("b", prompt=range(20)))
    world.step()
    world.scheduler.add(make_request("c", prompt=range(25)))
    with pytest.raises(OverloadedError) as caught:
        world.scheduler.add(make_request("d", prompt=range(25)))
    # 20 tokens too many; those started so far left at 40 (or 120) + 40 in the time since the first start.
    assert caught.value.retry_after is not None and caught.value.retry_after >= 2.0
    world.run()
    assert world.scheduler.stats().waiting_tokens == 0
