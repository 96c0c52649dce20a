"""Who is served first under each policy, who gives way, and that nobody waits for ever."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.core.errors import InvalidRequestError, OverloadedError
from quire.core.ids import RequestId
from quire.core.request import Request
from quire.scheduler.policy import AGEING_TOKENS, PRIORITY_SECONDS, Fair
from quire.scheduler.prediction import LengthPredictor
from quire.scheduler.waiting import WaitingQueue

from .fake_text import expected_output
from .world import World, make_config, make_request

POLICIES = ("fcfs", "priority", "fair", "sjf")


def order_of_starts(world: World, max_steps: int = 2000) -> list[str]:
    """Run to the end, a tenth of a second per step; who got a slot, in order."""
    names: list[str] = []
    for _ in range(max_steps):
        before = {sequence.arrival for sequence in world.scheduler._running}
        world.clock.now += 0.1
        if world.step() is None:
            return names
        finished = [key[0] for key in world.finished if key[0] not in names]
        started = [s.request.id for s in world.scheduler._running if s.arrival not in before]
        names += [name for name in [*finished, *started] if name not in names]
    raise AssertionError("still work")


def one_at_a_time(policy: str, **changes: Any) -> World:
    """One slot, so that the order of the queue is the order of starts."""
    return World(make_config(policy=policy, max_num_seqs=1, prefix_cache=False, **changes))


def test_fcfs_serves_by_arrival_whatever_requests_say():
    world = one_at_a_time("fcfs")
    for number in range(4):
        world.scheduler.add(make_request(f"r{number}", priority=-number, tenant=str(number), max_tokens=9 - number))
    assert order_of_starts(world) == ["r0", "r1", "r2", "r3"]


def test_lower_priority_numbers_first_and_equal_ones_by_arrival():
    world = one_at_a_time("priority")
    for number, priority in enumerate([0, 5, -1, 5, 0, -1000, 1000]):
        world.scheduler.add(make_request(f"r{number}", priority=priority))
    assert order_of_starts(world) == ["r5", "r2", "r0", "r4", "r1", "r3", "r6"]


def test_waiting_makes_up_for_priority():
    world = one_at_a_time("priority")
    world.scheduler.add(make_request("low", priority=1))
    world.clock.now += PRIORITY_SECONDS - 1
    world.scheduler.add(make_request("high", priority=0))
    world.clock.now += 2
    world.scheduler.add(make_request("late", priority=0))
    assert order_of_starts(world) == ["high", "low", "late"]


@pytest.mark.parametrize("priority", [-1001, 1001])
def test_priorities_out_of_range_are_refused(priority):
    with pytest.raises(InvalidRequestError, match="priority must be >= -1000 and <= 1000"):
        make_request(priority=priority)


def crowded(policy: str, priorities: list[int]) -> tuple[World, list[Request]]:
    """Three sequences that together do not fit the pool, running."""
    world = World(make_config(policy=policy, num_pages=24, prefix_cache=False))
    requests = [
        make_request(f"r{number}", prompt=range(1, 6 + number), max_tokens=28, priority=priority)
        for number, priority in enumerate(priorities)
    ]
    for request in requests:
        world.scheduler.add(request)
    return world, requests


def test_growth_preempts_the_lowest_priority_not_the_youngest():
    world, requests = crowded("priority", [0, 9, 0])
    world.step()
    while not (waiting := [sequence.request.id for sequence in world.scheduler._waiting]):
        world.step()
    assert waiting == ["r1"]
    world.run()
    for request in requests:
        assert world.tokens[request.id, 0] == expected_output(request, 0, world.config)[0]


def test_an_urgent_request_takes_pages_from_lower_priorities_only():
    for running, preempted in ((3, True), (0, False), (-1, False)):
        world = World(make_config(policy="priority", num_pages=24))
        world.scheduler.add(make_request("old", prompt=range(1, 30), max_tokens=8, priority=running))
        for _ in range(3):
            world.step()
        world.scheduler.add(make_request("urgent", prompt=range(20, 50), max_tokens=2, priority=0))
        plan = world.step()
        assert plan is not None and bool(plan.assignments) == preempted
        world.run()
        assert world.sequences["old", 0].preemptions == preempted
        assert next(iter(world.finished)) == (("urgent", 0) if preempted else ("old", 0))


def test_nobody_is_preempted_for_a_slot_or_where_it_does_not_help():
    world = World(make_config(policy="priority", max_num_seqs=1))
    world.scheduler.add(make_request("old", priority=3, max_tokens=9))
    world.step()
    world.scheduler.add(make_request("urgent", priority=0))
    world.run()
    assert world.scheduler.stats().preemptions_total == 0
    world = World(make_config(policy="priority", num_pages=24))
    world.scheduler.add(make_request("same", prompt=range(1, 25), max_tokens=5, priority=0))
    world.scheduler.add(make_request("low", prompt=(1,), max_tokens=5, priority=9))
    world.step()
    world.scheduler.add(make_request("equal", prompt=range(40, 10, -1), priority=0, max_tokens=2))
    world.step()
    assert world.scheduler.stats().preemptions_total == 0, "the pages of the low one alone are too few"
    world.run()


def flood(policy: str, others: int, slots: int = 2) -> dict[str, float]:
    """One tenant queues 60 requests, then a quiet one sends five, one after another; seconds each of those took."""
    world = World(make_config(policy=policy, max_num_seqs=slots, max_waiting=1000, prefix_cache=False))
    for number in range(others):
        world.scheduler.add(make_request(f"flood{number}", prompt=range(1, 20), tenant="flood", max_tokens=12))
    taken = {}
    for number in range(5):
        name, begun = f"quiet{number}", world.clock.now
        world.scheduler.add(make_request(name, prompt=range(20, 39), tenant="quiet", max_tokens=12))
        while (name, 0) not in world.finished:
            world.step()
            world.clock.now += 1.0
        taken[name] = world.clock.now - begun
    return taken


def test_a_flooding_tenant_hardly_delays_another_one():
    alone, fair, fcfs = flood("fair", 0), flood("fair", 60), flood("fcfs", 60)
    # At most until a slot is free (12 steps), and slower by sharing the step's tokens.
    assert max(fair.values()) <= 2.5 * max(alone.values())
    assert max(fcfs.values()) > 10 * max(fair.values())


def service(world: World, tenant: str) -> int:
    """Tokens generated for a tenant."""
    return sum(len(tokens) for (name, _), tokens in world.tokens.items() if name.startswith(tenant))


def test_backlogged_tenants_get_equal_shares_of_tokens_not_of_requests():
    world = World(make_config(policy="fair", max_num_seqs=4, max_waiting=1000, prefix_cache=False))
    for number in range(400):
        world.scheduler.add(make_request(f"short{number}", tenant="short", prompt=(1, 2), max_tokens=3))
        if number < 50:
            world.scheduler.add(make_request(f"long{number}", tenant="long", prompt=(1, 2), max_tokens=30))
    for _ in range(500):
        world.step()
    shares = [service(world, tenant) for tenant in ("short", "long")]
    assert max(shares) < 1.5 * min(shares)


def test_a_tenant_that_was_away_saves_up_no_service():
    world = World(make_config(policy="fair", max_num_seqs=1, max_waiting=1000, prefix_cache=False))
    for number in range(40):
        world.scheduler.add(make_request(f"busy{number}", tenant="busy"))
    for _ in range(80):
        world.step()
    for number in range(20):
        world.scheduler.add(make_request(f"back{number}", tenant="back"))
    names = order_of_starts(world)
    ahead = [name[:4] for name in names if (name, 0) in world.finished][-38:][:16]
    assert 5 <= ahead.count("back") <= 11, "they take turns"


def test_a_new_tenant_begins_at_the_smallest_counter_of_the_active_ones():
    world = World(make_config(policy="fair", max_num_seqs=8, prefix_cache=False))
    policy = world.scheduler._policy
    assert isinstance(policy, Fair)
    world.scheduler.add(make_request("a", tenant="a", max_tokens=20))
    world.scheduler.add(make_request("b", tenant="b", max_tokens=5))
    for _ in range(10):
        world.step()
    assert policy.standing("a") == 3 + 2 * 10
    world.scheduler.add(make_request("c", tenant="c"))
    assert policy.standing("c") == policy.standing("a")
    world.scheduler.abort(RequestId("c"))
    world.run()
    world.scheduler.add(make_request("d", tenant="d"))
    assert policy.standing("d") == 3 + 2 * 20, "all were idle: the counter of the last"
    world.scheduler.add(make_request("b2", tenant="b"))
    assert policy.standing("b") == policy.standing("d")


def test_cached_prompts_and_recomputation_are_not_charged():
    world = World(make_config(policy="fair"))
    world.scheduler.add(make_request("a", tenant="a", prompt=range(1, 18), max_tokens=1))
    world.run()
    world.scheduler.add(make_request("hold", tenant="a", prompt=range(1, 18), max_tokens=9))
    policy = world.scheduler._policy
    before = policy.standing("a")
    world.step()
    world.step()
    assert policy.standing("a") == before + (17 - 16) + 2 * 2
    (sequence,) = world.scheduler._running
    world.scheduler._preempt(sequence)
    world.step()
    assert policy.standing("a") == before + 1 + 2 * 3
    world.run()


def trained_for_two_tenants() -> World:
    """Outputs of `talker` were 40 tokens long, those of `terse` 2."""
    world = one_at_a_time("sjf", max_model_len=200, max_waiting=1000)
    for number in range(8):
        world.scheduler.add(make_request(f"t{number}", tenant="talker", max_tokens=40))
        world.scheduler.add(make_request(f"s{number}", tenant="terse", max_tokens=2))
    world.run()
    return world


def test_the_shortest_expected_output_comes_first_and_limits_stay():
    world = trained_for_two_tenants()
    world.scheduler.add(make_request("talk", tenant="talker", max_tokens=60))
    world.scheduler.add(make_request("terse", tenant="terse", max_tokens=60))
    world.scheduler.add(make_request("bounded", tenant="talker", max_tokens=1))
    names = order_of_starts(world)
    assert names[-3:] == ["bounded", "terse", "talk"]
    assert [len(world.tokens[name, 0]) for name in ("talk", "terse", "bounded")] == [60, 60, 1]


def test_waiting_makes_up_for_an_expected_length():
    world = trained_for_two_tenants()
    world.scheduler.add(make_request("talk", tenant="talker", max_tokens=60))
    for number in range(100):
        world.scheduler.add(make_request(f"terse{number}", tenant="terse", max_tokens=2))
        world.clock.now += 0.04
    names = order_of_starts(world)[16:]
    overtook = names.index("talk")
    # 38 tokens expected more are 38 / 64 seconds, in which 15 others arrived.
    assert overtook == pytest.approx(38 / AGEING_TOKENS / 0.04, abs=2)


def test_an_output_that_outlives_its_prediction_gives_way():
    world = trained_for_two_tenants()
    world.scheduler.add(make_request("wrong", tenant="terse", max_tokens=60))
    world.step()
    (sequence,) = world.scheduler._running
    before = world.scheduler._policy.rank(sequence)
    for _ in range(30):
        world.step()
    assert world.scheduler._policy.rank(sequence) > before + 20
    world.run()


def test_predictions_by_tenant_and_prompt_then_tenant_then_all():
    predictor = LengthPredictor()
    assert predictor.predict("a", 10, 100) == 100
    for _ in range(10):
        predictor.learn("a", 10, 20)
        predictor.learn("a", 1000, 80)
    assert predictor.predict("a", 9, 500) == pytest.approx(20)
    assert predictor.predict("a", 900, 500) == pytest.approx(80)
    assert 20 < predictor.predict("a", 10**6, 500) < 80
    assert predictor.predict("b", 10, 500) == predictor.predict("a", 10**6, 500)
    for number in range(20_000):
        predictor.learn(str(number), 5, 7)
    assert len(predictor._means) <= 10_000 and predictor.predict("new", 5, 500) == pytest.approx(7)


@pytest.mark.parametrize("policy", POLICIES)
def test_preempted_sequences_come_back_before_new_ones_of_equal_rank(policy):
    world = World(make_config(policy=policy, prefix_cache=False))
    for name in ("a", "b"):
        world.scheduler.add(make_request(name))
    world.step()
    for sequence in list(world.scheduler._running):
        world.scheduler._preempt(sequence)
    world.scheduler.add(make_request("new"))
    assert [sequence.request.id for sequence in world.scheduler._waiting][:2] == ["a", "b"]
    world.run()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_large_head_of_the_queue_is_not_starved_by_small_ones(policy):
    world = World(make_config(policy=policy, num_pages=24, max_waiting=1000, prefix_cache=False))
    world.scheduler.add(make_request("first", prompt=range(1, 13), max_tokens=8, tenant="x"))
    world.step()
    world.scheduler.add(make_request("large", prompt=range(5, 45), max_tokens=1, tenant="x"))
    for number in range(1500):
        if (name := ("large", 0)) in world.finished:
            break
        world.scheduler.add(make_request(f"s{number}", prompt=(number % 50,), max_tokens=3, tenant="x"))
        world.step()
        world.clock.now += 0.05
    assert name in world.finished


@settings(max_examples=24)
@given(seed=st.integers(0, 2**32), policy=st.sampled_from(POLICIES))
def test_nobody_starves_at_twice_the_load_that_can_be_served(seed, policy):
    """Arrivals for ever; everybody who came in the first seconds ends while they go on."""
    rng = random.Random(seed)
    world = World(make_config(policy=policy, num_pages=60, max_num_seqs=4, max_waiting=10_000))
    early, count = set(), 0
    for step in range(4000):
        # A slot serves a request of about 5 steps: 4 slots 0.8 requests a step. Twice that come at first.
        if rng.random() < 0.8 or len(world.scheduler._waiting) < 40:
            for _ in range(2):
                name = f"r{count}"
                count += 1
                low = rng.random() < 0.2
                request = make_request(
                    name,
                    prompt=[rng.randrange(1, 50) for _ in range(rng.randint(1, 9))],
                    max_tokens=rng.choice([1, 3, 5, 20 if low else 5]),
                    priority=3 if low else -rng.randint(0, 2),
                    tenant=rng.choice("aaaaab"),
                )
                try:
                    world.scheduler.add(request)
                except OverloadedError:
                    continue
                if step < 20:
                    early.add((name, 0))
        world.step()
        world.clock.now += 0.5
        if step > 20 and early <= world.finished.keys():
            break
    starving = early - world.finished.keys()
    assert early and not starving, f"{len(starving)} of {len(early)} starve under {policy}"


def test_leaving_a_long_queue_looks_at_few_lanes():
    world = World(make_config(policy="fair", max_waiting=200_000))
    policy, calls = world.scheduler._policy, 0
    queue = WaitingQueue(policy)
    sequences = []
    for number in range(20_000):
        request = make_request(f"r{number}", tenant=str(number % 5000))
        world.scheduler.add(request)
        sequences.append(world.scheduler._requests[request.id][0])
        queue.add(sequences[-1])
    standing = policy.standing

    def counted(lane: str) -> float:
        nonlocal calls
        calls += 1
        return standing(lane)

    policy.standing = counted  # type: ignore[method-assign]
    for sequence in sequences[::2]:
        queue.remove(sequence)
    for _ in range(1000):
        head = queue.first()
        assert head is not None
        queue.start(head, 0.0)
    assert len(queue) == 9000 and calls < 20_000
    assert queue.num_tokens == 9000 * 3 and queue.priorities["normal"] == 9000
