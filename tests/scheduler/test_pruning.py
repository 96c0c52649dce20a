"""When sequences are told to forget, where the survivors go, and who waits for whose pages."""

from collections.abc import Iterable
from typing import Any

import msgspec
import pytest

from quire.core.errors import ContextLengthError, InvalidRequestError
from quire.core.messages import single_events
from quire.core.pruning import PolicyInfo, PruneCounts, PruneParams
from quire.core.request import Request

from .fake_text import expected_output
from .world import World, make_config, make_request, step

POLICIES = {
    "any": PolicyInfo(),
    "newest": PolicyInfo(observes="newest"),
    "repeating": PolicyInfo(repeats=True),
    "selecting": PolicyInfo(selects=True),
}
PROMPT = range(1, 19)
"""Four pages of 4 and two tokens."""


def world_of(**changes: Any) -> World:
    return World(make_config(policies=POLICIES, **changes))


def pruned(name: str, prompt: Iterable[int] = PROMPT, *, seed: int = 1, max_tokens: int = 8, **changes: Any) -> Request:
    """A request that keeps half of its entries, at least 3."""
    values: dict[str, Any] = {"policy": "any", "floor": 3, "window": 1, "sinks": 1, "every": 4} | changes
    params = PruneParams(**values)
    plain = make_request(name, prompt, seed=seed, max_tokens=max_tokens)
    return msgspec.structs.replace(plain, prune=params, repeat_ids=(7, 7))


def test_ordered_with_the_last_chunk_and_compacted_in_the_next_plan():
    world = world_of(prefix_cache=False)
    world.scheduler.add(pruned("a"))
    (order,) = step(world).prunes
    assert order.target == 9 and world.scheduler.stats().pages_used == 10
    plan = step(world)
    (compaction,) = plan.compactions
    assert compaction.pages is None and 6 <= world.scheduler.stats().pages_used <= 8
    assert world.scheduler.stats().prunes["any"].prunes == {"prompt": 1}
    world.run()
    assert world.scheduler.stats().prunes["any"].prunes == {"prompt": 1, "decode": 1}


def test_after_each_chunk_so_that_the_peak_falls():
    world = world_of(max_batch_tokens=6, prefix_cache=False)
    world.scheduler.add(pruned("a", range(1, 37), keep=0.25))
    peaks = []
    while world.scheduler.has_work:
        step(world)
        peaks.append(world.scheduler.stats().pages_used)
    assert max(peaks) <= 2 * 5 < 2 * 9, "36 entries take 9 pages a head, 9 and a chunk of 6 five at most"
    world.scheduler.add(pruned("b", range(1, 37), keep=0.25, chunked=False))
    world.run()
    assert world.scheduler.stats().prunes["any"].prunes["prompt"] > 1


def test_keeping_all_is_no_pruning():
    world = world_of()
    world.scheduler.add(pruned("a", keep=1.0))
    while world.scheduler.has_work:
        plan = step(world)
        assert not plan.prunes and not plan.compactions
    assert world.tokens["a", 0] == expected_output(make_request("a", PROMPT, max_tokens=8), 0, world.config)[0]


def test_published_blocks_stay_as_they_are_and_serve_others():
    world = world_of()
    world.scheduler.add(pruned("a"))
    step(world)
    plan = step(world)
    assert plan.compactions[0].pages is not None, "its full blocks may be read by others"
    world.scheduler.add(make_request("b", PROMPT, max_tokens=8))
    assert step(world).assignments[0].cached == 16
    world.run()
    assert world.tokens["b", 0] == expected_output(make_request("b", PROMPT, max_tokens=8), 0, world.config)[0]
    world.scheduler.add(make_request("c", (*PROMPT, *world.tokens["a", 0]), seed=3))
    assert step(world).assignments[0].cached == 16, "what it computed after it was pruned is nobody's"
    world.run()


def test_without_free_pages_its_blocks_are_taken_back():
    world = world_of(num_pages=10, max_model_len=20)
    world.scheduler.add(pruned("a", max_tokens=2))
    step(world)
    assert len(world.published_pages()) == 8
    assert step(world).compactions[0].pages is None and not world.published_pages()
    world.run()


def test_blocks_that_others_read_deny_a_prune_until_there_is_room():
    world = world_of(num_pages=18, max_model_len=24)
    world.scheduler.add(pruned("first", seed=2, max_tokens=6, when="pressure"))
    step(world)
    for name, seed in (("a", 3), ("b", 4)):
        world.scheduler.add(pruned(name, seed=seed, max_tokens=6))
    step(world)
    scheduler, cache = world.scheduler, world.scheduler._cache
    taken = cache.take(cache.available)
    plan = scheduler.plan()
    cache.give(taken)
    assert plan is not None and not plan.compactions and not scheduler.stats().prunes["any"].entries
    for event in single_events(scheduler.commit(plan, world.engine.step(plan))):
        world._collect(event)
    world.run()
    assert world.engine.compactions, "it is tried again"
    assert len(world.finished) == 3


def test_what_must_be_observed_is_computed_anew():
    world = world_of()
    world.scheduler.add(make_request("a", PROMPT))
    world.run()
    for policy, window, cached in (("any", 1, 16), ("newest", 1, 16), ("newest", 7, 8), ("repeating", 1, 16)):
        world.scheduler.add(pruned(policy + str(window), policy=policy, window=window, max_tokens=1))
        assert step(world).assignments[0].cached == cached
        world.run()


def test_the_model_repeats_its_prompt_before_it_forgets():
    world = world_of(max_batch_tokens=16, prefix_cache=False)
    world.scheduler.add(pruned("a", policy="repeating"))
    plans = [step(world) for _ in range(5)]
    scratch = [part for plan in plans for part in plan.sequences if part.scratch]
    assert [part.start for part in scratch] == [18, 18], "behind the prompt, the second over the first"
    assert scratch[0].token_ids == (7, 7, *range(1, 15))
    assert scratch[1].token_ids == (7, 7, *range(7, 15), *range(15, 19)), "after the end of what it said before"
    assert len(plans[3].prunes) == len(plans[4].compactions) == 1
    world.run()
    assert world.engine.compactions == 1


def test_what_is_too_short_to_be_pruned_is_not_repeated():
    world = world_of()
    world.scheduler.add(pruned("a", policy="repeating", floor=18))
    while world.scheduler.has_work:
        plan = step(world)
        assert not any(part.scratch for part in plan.sequences) and not plan.prunes
    assert len(world.tokens["a", 0]) == 8


@pytest.mark.parametrize(("policy", "steps"), [("any", 1), ("repeating", 2)])
def test_a_context_is_pruned_before_the_question_is_read(policy: str, steps: int):
    world = world_of(max_batch_tokens=32, prefix_cache=False)
    world.scheduler.add(pruned("a", policy=policy, context=14, every=0))
    plans = [step(world) for _ in range(steps + 1)]
    assert plans[0].sequences[0].token_ids == tuple(range(1, 15)), "not a token of the question"
    (order,) = plans[steps - 1].prunes
    assert order.target == 7, "half of the context"
    assert plans[steps].compactions and plans[steps].sequences[0].token_ids == tuple(range(15, 19))
    assert plans[steps].sequences[0].sample
    world.run()
    assert world.scheduler.stats().prunes[policy].prunes == {"prompt": 1}


def test_a_context_longer_than_the_prompt_is_the_prompt():
    world = world_of(prefix_cache=False)
    world.scheduler.add(pruned("a", context=99))
    assert step(world).prunes[0].target == 9


def test_of_a_context_found_in_the_prefix_cache_what_is_pruned_after_is_computed():
    world = world_of()
    world.scheduler.add(make_request("a", PROMPT))
    world.run()
    for policy, window, cached in (("any", 1, 8), ("newest", 5, 4)):
        world.scheduler.add(pruned(policy, policy=policy, window=window, context=10, max_tokens=1))
        plan = step(world)
        assert plan.assignments[0].cached == cached and len(plan.sequences[0].token_ids) == 10 - cached
        world.run()


@pytest.mark.parametrize("prunes", [True, False])
def test_under_pressure_who_holds_most_forgets_and_the_needy_waits_a_step(prunes: bool):
    world = world_of(num_pages=24, prefix_cache=False, prunes_under_pressure=prunes)
    world.scheduler.add(pruned("big", range(1, 25), max_tokens=12, when="pressure"))
    world.scheduler.add(make_request("plain", range(1, 9), seed=2, max_tokens=16))
    reasons = []
    while world.scheduler.has_work:
        plan = step(world)
        reasons += [order.target for order in plan.prunes]
    stats = world.scheduler.stats()
    assert bool(reasons) == prunes == (stats.preemptions_total == 0)
    plain = expected_output(make_request("plain", range(1, 9), seed=2, max_tokens=16), 0, world.config)[0]
    assert world.tokens["plain", 0] == plain and len(world.tokens["big", 0]) == 12


def test_under_pressure_whom_it_harms_least_forgets():
    """Both may: one holds hardly more than it must keep, the other four times as much, and that is enough."""
    world = world_of(num_pages=30, prefix_cache=False, prunes_under_pressure=True)
    for name, keep in (("little", 0.8), ("much", 0.25)):
        world.scheduler.add(pruned(name, range(1, 17), max_tokens=12, when="pressure", keep=keep))
    world.scheduler.add(make_request("plain", range(1, 9), seed=3, max_tokens=24))
    slots: dict[str, Any] = {}
    while world.scheduler.has_work:
        plan = step(world)
        slots |= {sequence.request.id: sequence.slot for sequence in world.scheduler._running}
        assert all(order.slot == slots["much"] for order in plan.prunes)
    stats = world.scheduler.stats()
    assert stats.prunes["any"].prunes["pressure"] > 0 and not stats.preemptions_total


@pytest.mark.parametrize(("policy", "why"), [("repeating", "repeated the prompt"), ("selecting", "frees nothing")])
def test_who_cannot_prune_under_pressure_is_not_asked_to(policy: str, why: str):
    world = world_of(prunes_under_pressure=True)
    with pytest.raises(InvalidRequestError, match=why) as refused:
        world.scheduler.add(pruned("a", policy=policy, when="pressure"))
    assert refused.value.param == "prune.when"
    world.scheduler.add(pruned("a", policy=policy))
    world.run()


def test_pruned_sequences_are_preempted_last_and_that_is_counted():
    world = world_of(num_pages=16, prefix_cache=False, max_model_len=28)
    world.scheduler.add(pruned("a", range(1, 10), max_tokens=12, keep=0.9))
    world.scheduler.add(pruned("b", range(1, 10), seed=2, max_tokens=12, keep=0.9))
    world.run()
    stats = world.scheduler.stats()
    assert stats.preemptions_total >= stats.lossy_preemptions_total >= 1
    assert len(world.finished) == 2


def oversize(**changes: Any) -> Request:
    """60 tokens for a pool of 36 entries a head: 12 stay, and there is room for a chunk of 8."""
    return pruned("large", range(1, 49), max_tokens=12, **{"keep": 0.2, "floor": 3} | changes)


SMALL_POOL: dict[str, Any] = {"num_pages": 18, "max_batch_tokens": 8}


def test_a_prompt_that_fits_because_it_is_pruned_is_taken():
    world = world_of(**SMALL_POOL)
    world.scheduler.add(oversize())
    world.run()
    assert len(world.tokens["large", 0]) == 12
    with pytest.raises(ContextLengthError, match="the KV cache"):
        world.scheduler.add(make_request("whole", range(1, 49), max_tokens=12))


@pytest.mark.parametrize(
    "changes",
    [
        {"keep": 0.9},
        {"chunked": False},
        {"when": "pressure"},
        {"policy": "repeating"},
        {"budget": "threshold", "threshold": 0.5},
        {"context": 12, "every": 0},
    ],
)
def test_one_that_may_not_fit_is_refused(changes: dict[str, Any]):
    with pytest.raises(ContextLengthError, match="the KV cache"):
        world_of(**SMALL_POOL).scheduler.add(oversize(**changes))


def test_without_a_length_it_gets_as_long_as_it_fits():
    world = world_of(**SMALL_POOL)
    world.scheduler.add(msgspec.structs.replace(oversize(), params=make_request(max_tokens=None).params))
    world.run()
    assert world.finished["large", 0].reason == "length"
    assert len(world.tokens["large", 0]) == 64 - 48


def test_it_goes_on_beside_others_and_after_preemption():
    for num_host_pages in (0, 40):
        world = world_of(**SMALL_POOL, num_host_pages=num_host_pages, policy="priority")
        world.scheduler.add(oversize())
        for turn in range(6):
            for _ in range(5):
                world.step()
            world.scheduler.add(make_request(f"small{turn}", range(1 + turn, 9 + turn), max_tokens=9, priority=-turn))
        world.run()
        assert len(world.tokens["large", 0]) == 12 and not world.failed


def test_alone_it_is_pruned_before_it_does_not_fit():
    """Even if what was chosen is lost, as by a preemption just then."""
    world = world_of(**SMALL_POOL)
    world.scheduler.add(oversize())
    while not world.tokens["large", 0]:
        step(world)
        (state,) = (sequence.prune for sequence in world.scheduler._running)
        assert state is not None
        if (
            "pressure" not in world.scheduler.stats().prunes.get("any", PruneCounts()).prunes
            and state.reason == "prompt"
        ):
            state.cancel()
    world.run()
    assert world.scheduler.stats().prunes["any"].prunes["pressure"] >= 1
    assert len(world.tokens["large", 0]) == 12


def test_what_prunes_itself_is_pruned_early_before_anyone_is_preempted():
    for every, preemptions in ((100, False), (0, True)):
        world = world_of(num_pages=24, prefix_cache=False)
        for name in "ab":
            world.scheduler.add(pruned(name, range(1, 17), max_tokens=24, every=every))
        world.run()
        stats = world.scheduler.stats()
        assert bool(stats.preemptions_total) == preemptions
        assert ("pressure" in stats.prunes["any"].prunes) != preemptions


def test_a_prompt_that_is_pruned_takes_smaller_chunks_where_pages_are_short():
    world = world_of(num_pages=20, max_batch_tokens=16, prefix_cache=False)
    world.scheduler.add(make_request("first", range(1, 13), max_tokens=8))
    world.scheduler.add(pruned("large", range(1, 49), keep=0.2))
    sizes = []
    while world.scheduler.has_work:
        plan = step(world)
        sizes += [len(part.token_ids) for part in plan.sequences if len(part.token_ids) > 1]
    assert sizes == [12, 4, 15, 10, 11, 8], "beside one that decodes 15 could be computed: pages were short"
    assert not world.scheduler.stats().preemptions_total
    assert len(world.tokens["large", 0]) == 8


def test_a_stream_may_outgrow_the_context_while_what_it_keeps_does_not():
    """Its prompt too, whose chunks are cut to the room that is left."""
    limits: dict[str, Any] = {"max_batch_tokens": 30, "max_model_len": 40, "max_stream_len": 300, "num_pages": 60}
    world = world_of(**limits)
    values: dict[str, Any] = {"policy": "any", "keep": 0.01, "floor": 14, "window": 1, "sinks": 1, "every": 5}
    params = PruneParams(**values, positions="cache")
    with pytest.raises(InvalidRequestError, match="code"):
        world.scheduler.add(msgspec.structs.replace(make_request("no", PROMPT), prune=params))
    world = World(make_config(**limits, policies={"any": PolicyInfo(closes_up=True)}))
    long = make_request("a", [1 + i % 40 for i in range(150)], max_tokens=150)
    for changes in ({"positions": "text"}, {"keep": 0.2}):
        with pytest.raises(ContextLengthError):
            world.scheduler.add(msgspec.structs.replace(long, prune=PruneParams(**values | changes)))
    with pytest.raises(ContextLengthError, match="300"):
        longer = msgspec.structs.replace(long.params, max_tokens=151)
        world.scheduler.add(msgspec.structs.replace(long, params=longer, prune=params))
    world.scheduler.add(msgspec.structs.replace(long, prune=params))
    chunks = []
    while world.scheduler.has_work:
        plan = step(world)
        chunks += [len(part.token_ids) for part in plan.sequences]
        for sequence in world.scheduler._running:
            assert sequence.table.kept.max() + sequence.in_flight <= 40
        assert all(assignment.max_length == 40 for assignment in plan.assignments)
    assert max(chunks) == 30 and 26 in chunks and len(world.tokens["a", 0]) == 150
