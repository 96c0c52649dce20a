"""Plans made while a step is in flight: what they hold, when there are none, what becomes of who ended meanwhile."""

from typing import Any, cast

import msgspec
import numpy as np
import pytest

from quire.core.ids import RequestId
from quire.core.messages import Decoded, Event, Failed, Finished, StepEvent, Tokens, single_events
from quire.core.plan import NO_TOKEN, BatchPlan, StepOutput
from quire.core.pruning import PolicyInfo, PruneParams
from quire.scheduler.loop import EngineLoop
from quire.scheduler.scheduler import Scheduler

from .fake_engine import FakeEngine
from .fake_text import expected_output
from .test_decodes import decoding
from .world import World, make_config, make_request


def in_flight(scheduler: Scheduler) -> BatchPlan:
    """Plan a step and leave it in flight."""
    plan = scheduler.plan()
    assert plan is not None
    return plan


def commit(scheduler: Scheduler, plan: BatchPlan, *token_ids: int) -> list[StepEvent]:
    """The plan's rows have sampled these tokens."""
    events = scheduler.commit(plan, StepOutput((), decoded=np.array(token_ids, np.int32)))
    scheduler.check_integrity()
    return events


def test_the_next_step_goes_on_one_position_further_without_its_tokens():
    scheduler = decoding(a={"max_tokens": 9}, b={"max_tokens": 9})
    first = in_flight(scheduler)
    second = scheduler.look_ahead()
    assert second is not None and not second.sequences
    assert second.decodes.token_ids.tolist() == [NO_TOKEN] * 2
    assert (second.decodes.starts == first.decodes.starts + 1).all()
    assert commit(scheduler, first, 5, 6) == [Decoded([RequestId("a"), RequestId("b")], [0, 0], [5, 6])]
    third = scheduler.look_ahead()
    assert third is not None and (third.decodes.starts == first.decodes.starts + 2).all()
    commit(scheduler, second, 7, 8)
    commit(scheduler, third, 5, 6)
    assert in_flight(scheduler).decodes.token_ids.tolist() == [5, 6]


def test_pages_are_there_for_both_steps():
    world = World(make_config(page_size=1, num_pages=40), looks_ahead=True)
    world.scheduler.add(request := make_request(max_tokens=12))
    world.run()
    assert world.planned_ahead == 10, "all but the prompt's step and the first decode, which no step precedes"
    assert world.tokens["r", 0] == expected_output(request, 0, world.config)[0]


def test_who_surely_ends_is_left_out_and_who_ends_by_chance_is_dropped_later():
    scheduler = decoding(a={"max_tokens": 2}, b={"stop_token_ids": (4,), "max_tokens": 9}, c={"max_tokens": 9})
    first = in_flight(scheduler)
    second = scheduler.look_ahead()
    assert second is not None and second.decodes.slots.tolist() == first.decodes.slots.tolist()[1:]
    events = list(single_events(commit(scheduler, first, 7, 4, 8)))
    assert [event.request_id for event in events if isinstance(event, Finished)] == ["a", "b"]
    assert scheduler.stats().running == 2, "b holds its slot until its last step is committed"
    assert commit(scheduler, second, 6, 5) == [Decoded([RequestId("c")], [0], [5])]
    assert scheduler.stats().running == 1


def test_an_abort_with_two_steps_in_flight_waits_for_both():
    scheduler = decoding(a={"max_tokens": 9}, b={"max_tokens": 9})
    first = in_flight(scheduler)
    second = scheduler.look_ahead()
    assert second is not None and scheduler.abort(RequestId("a"))
    used = scheduler.stats().pages_used
    assert commit(scheduler, first, 5, 6) == [Decoded([RequestId("b")], [0], [6])]
    assert (scheduler.stats().running, scheduler.stats().pages_used) == (2, used)
    assert commit(scheduler, second, 5, 6) == [Decoded([RequestId("b")], [0], [6])]
    assert scheduler.stats().running == 1 and scheduler.stats().pages_used == used // 2


def test_a_failed_row_fails_once():
    scheduler = decoding(a={"max_tokens": 9}, b={"max_tokens": 9})
    first = in_flight(scheduler)
    second = scheduler.look_ahead()
    assert second is not None
    assert [type(event) for event in commit(scheduler, first, NO_TOKEN, 6)] == [Decoded, Failed]
    assert commit(scheduler, second, NO_TOKEN, 6) == [Decoded([RequestId("b")], [0], [6])]


@pytest.mark.parametrize(
    "blocked, others, config",
    [
        (False, {}, {}),
        (True, {"late": {}}, {}),  # may come in
        (False, {"late": {}}, {"max_num_seqs": 1}),  # has no slot
        (False, {"late": {"prompt": range(20, 40)}}, {"num_pages": 14}),  # has no pages
        (True, {"late": {"priority": -5}}, {"num_pages": 14, "policy": "priority"}),  # may take some
    ],
)
def test_a_step_that_could_let_somebody_in_is_not_planned_ahead(blocked, others, config):
    scheduler = Scheduler(make_config(**config))
    scheduler.add(make_request("early", prompt=range(1, 10), max_tokens=9))
    commit_prompt(scheduler)
    in_flight(scheduler)
    for name, changes in others.items():
        scheduler.add(make_request(name, **changes))
    assert (scheduler.look_ahead() is None) == blocked


def commit_prompt(scheduler: Scheduler) -> None:
    """One step of one prompt, whose token is 9."""
    engine = FakeEngine(scheduler.config)
    plan = in_flight(scheduler)
    scheduler.commit(plan, engine.step(plan))


def test_a_leaving_sequence_lets_the_queue_in_a_step_later():
    world = World(make_config(max_num_seqs=1, eos_token_ids=range(1, 100)), looks_ahead=True)
    world.scheduler.add(make_request("a", ignore_eos=False, min_tokens=3, max_tokens=9))
    world.scheduler.add(make_request("b", max_tokens=2))
    plans = [world.step() for _ in range(6)]
    assert world.finished["a", 0].reason == "stop" and len(world.tokens["a", 0]) == 4
    # A prompt, three decodes, one too many, then the other prompt.
    assert [len(plan.decodes) for plan in plans if plan is not None] == [0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize(
    "params, prune",
    [
        ({"logprobs": 0}, None),  # wants more than a column
        ({"prompt": range(1, 41)}, None),  # has a prompt to go through
        ({}, PruneParams(policy="any", keep=0.5, floor=1, window=1, sinks=0, every=1)),  # forgets as it goes
    ],
)
def test_beside_who_needs_more_nothing_is_planned_ahead(params, prune):
    world = World(make_config(max_batch_tokens=8, policies={"any": PolicyInfo()}, num_pages=200), looks_ahead=True)
    world.scheduler.add(make_request("steady", max_tokens=12))
    world.step()
    world.step()
    world.step()
    ahead = world.planned_ahead
    assert ahead > 0
    request = make_request("other", **params)
    world.scheduler.add(request if prune is None else msgspec.structs.replace(request, prune=prune))
    while world.scheduler.stats().running < 2:
        world.step()
    ahead = world.planned_ahead
    for _ in range(3):
        world.step()
    assert world.planned_ahead == ahead
    world.run()


def test_short_pages_end_the_looking_ahead():
    """The pool holds both sequences for a while; then the younger must go."""
    world = World(make_config(num_pages=14, page_size=4), looks_ahead=True)
    requests = [make_request(name, max_tokens=20, seed=seed) for seed, name in enumerate("ab")]
    for request in requests:
        world.scheduler.add(request)
    world.run()
    assert world.scheduler.stats().preemptions_total == 1 and world.planned_ahead > 10
    for request in requests:
        assert world.tokens[request.id, 0] == expected_output(request, 0, world.config)[0]


@pytest.mark.parametrize("looks_ahead", [False, True])
def test_the_loop_ends_with_nothing_in_flight(looks_ahead):
    config = make_config()
    loop = EngineLoop(cast(Any, FakeEngine(config)), Scheduler(config), looks_ahead)
    for name in "abc":
        loop.submit(make_request(name, max_tokens=7, ignore_eos=False, min_tokens=4, stop_token_ids=range(40)))
    events: list[Event] = []
    while loop.has_work:
        events += single_events(loop.step().events)
    assert sum(isinstance(event, Finished) for event in events) == 3
    assert len([event for event in events if isinstance(event, Tokens)]) >= 3 * 5
    assert not loop._in_flight and loop.stats().pages_used == 0
