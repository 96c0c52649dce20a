"""Swapping, host copies of prefixes and pins, by a scheduler over the fake engine."""

import pytest

from quire.core.plan import BatchPlan, StepOutput
from quire.core.request import Request
from quire.scheduler.swap import SwapCosts

from .fake_text import expected_output
from .test_prefix import PROMPT, entered, run
from .test_simulation import POLICIES, VOCAB, soak
from .world import World, make_config, make_request


def pinned(name: str, prompt: object, seconds: float, **params: object) -> Request:
    plain = make_request(name, prompt, **params)  # type: ignore[arg-type]
    return Request(id=plain.id, prompt_ids=plain.prompt_ids, params=plain.params, seed=1, cache_ttl=seconds)


def crowd(world: World, name: str, count: int = 6) -> None:
    """Other prompts, one after another, that take all the room that can be had."""
    for number in range(count):
        run(world, make_request(f"{name}{number}", range(number * 7, number * 7 + 8), max_tokens=5))


def test_a_preempted_sequence_is_swapped_and_comes_back_without_recomputation():
    world = World(make_config(windows=(None, 5), num_host_pages=100))
    request = make_request("r", PROMPT, max_tokens=12)
    world.scheduler.add(request)
    for _ in range(6):
        world.step()
    (sequence,) = world.scheduler._running
    computed = sequence.num_computed
    world.scheduler._preempt(sequence)
    plan = world.step()
    assert plan is not None and plan.parks and plan.assignments[0].restored is not None
    assert plan.num_tokens == 1 and world.scheduler._running[0].num_computed == computed + 1
    world.run()
    assert world.tokens["r", 0] == expected_output(request, 0, world.config)[0]
    stats = world.scheduler.stats()
    assert stats.swap_out_sequences_total == stats.swap_in_sequences_total == 1
    assert stats.swap_out_pages_total == stats.swap_in_pages_total == len(plan.swap_outs.host) > 0


def test_an_aborted_sequence_leaves_nothing_in_host_memory():
    world = World(make_config(windows=(4, None), num_host_pages=100))
    world.scheduler.add(make_request("r", PROMPT))
    world.step()
    world.scheduler._preempt(world.scheduler._running[0])
    world.scheduler.abort(make_request("r").id)
    world.scheduler.add(make_request("next", (1, 2)))
    world.run()
    assert world.scheduler.stats().host_pages_parked == 0 and not world.engine.parked


def test_pruned_sequences_are_swapped_or_wait_and_none_is_recomputed():
    swaps = 0
    for pages in (40, 50, 60):
        limits = {"max_num_seqs": 12, "max_batch_tokens": 20, "vocab_size": VOCAB, "policies": POLICIES}
        traffic = soak(4, make_config(num_pages=pages, num_host_pages=1000, prefix_cache=pages == 60, **limits), 300)
        assert traffic.world.scheduler.stats().lossy_preemptions_total == 0
        swaps += traffic.world.engine.restored_after_pruning
    assert swaps > 5


def test_twice_the_load_ends_with_swapping():
    world = World(make_config(num_pages=48, windows=(None, 9), num_host_pages=60, max_num_seqs=8))
    requests = [make_request(f"r{i}", prompt=range(i % 9, i % 9 + 14), seed=i, max_tokens=26) for i in range(40)]
    for request in requests:
        world.scheduler.add(request)
    world.run()
    assert len(world.finished) == 40 and not world.failed
    for request in requests:
        assert world.tokens[request.id, 0] == expected_output(request, 0, world.config)[0]
    assert world.scheduler.stats().swap_in_sequences_total > 10


def test_evicted_prefixes_come_back_from_the_host_and_count_as_hits():
    world = World(make_config(num_pages=24, num_host_pages=40))
    run(world, make_request("a", PROMPT))
    crowd(world, "x", 3)
    world.scheduler.add(make_request("b", PROMPT))
    plan = world.step()
    assert entered(plan) == [16] and plan is not None and len(plan.swap_ins.host)
    world.run()
    stats = world.scheduler.stats()
    assert stats.prefix_host_hits_total == 4 * len(plan.swap_ins.host) // 2
    assert world.sequences["b", 0].cached_tokens == 16


def test_pinned_prompts_stay_until_their_time_and_others_go():
    world = World(make_config(num_pages=24))
    assert run(world, pinned("a", PROMPT, 60.0)) == 0
    assert world.sequences["a", 0].pinned_tokens == 16
    crowd(world, "x")
    world.clock.now = 59.0
    assert world.scheduler.stats().pages_pinned == 8
    assert run(world, make_request("b", PROMPT, max_tokens=1)) == 16
    world.clock.now = 61.0
    assert world.scheduler.stats().pages_pinned == 0
    crowd(world, "y")
    assert run(world, make_request("c", PROMPT, max_tokens=1)) == 0


def test_at_most_half_the_pool_is_pinned_and_the_operator_limits_the_time():
    world = World(make_config(num_pages=24, max_cache_ttl=10.0))
    run(world, pinned("a", range(1, 26), 1e9, max_tokens=1))
    run(world, pinned("b", range(30, 40), 5.0, max_tokens=1))
    assert [world.sequences[name, 0].pinned_tokens for name in "ab"] == [24, 0]
    world.clock.now = 11.0
    assert world.scheduler.stats().pages_pinned == 0


def test_pins_give_way_to_who_could_not_go_on_alone():
    world = World(make_config(num_pages=24))
    run(world, pinned("a", PROMPT, 60.0))
    big = make_request("big", range(20, 50), max_tokens=15, seed=3)
    run(world, big)
    stats = world.scheduler.stats()
    assert stats.pins_dropped_total > 0 and len(world.tokens["big", 0]) == 15


@pytest.mark.parametrize(("page_seconds", "pays"), [(0.001, True), (0.01, False)])
def test_swapping_pays_by_what_was_measured(page_seconds: float, pays: bool):
    costs = SwapCosts()
    assert costs.swap_pays(1, 10**6), "nothing is known yet"
    world = World(make_config())
    world.scheduler.add(make_request("r", PROMPT))
    plan = world.scheduler.plan()
    assert isinstance(plan, BatchPlan)
    costs.observe(plan, StepOutput((), forward_seconds=0.18, copied_pages=10, copy_seconds=10 * page_seconds))
    assert costs.swap_pays(tokens=20, pages=20) is pays
