"""How sequences end: stop tokens, length, errors, aborts in every state."""

import numpy as np
import pytest

from quire.core.ids import RequestId
from quire.core.messages import Failed, Finished, Tokens, single_events
from quire.core.plan import SequenceOutput, StepOutput
from quire.scheduler.scheduler import Scheduler

from .fake_engine import parts
from .world import EOS, World, make_config, make_request


def answer(scheduler: Scheduler, token: int) -> list:
    """One step in which the only sequence samples `token`; the commit's events."""
    plan = scheduler.plan()
    assert plan is not None and len(parts(plan)) == 1
    results = tuple(SequenceOutput((token,)) for _ in plan.sequences)
    decoded = np.full(len(plan.decodes), token, np.int32)
    return list(single_events(scheduler.commit(plan, StepOutput(results, decoded=decoded))))


def ending(token: int, **params) -> Finished | None:
    """The `Finished` after a first token `token`, or None if the sequence goes on."""
    scheduler = Scheduler(make_config())
    scheduler.add(make_request(**params))
    events = answer(scheduler, token)
    assert events[0] == Tokens(RequestId("r"), 0, [token])
    scheduler.check_integrity()
    assert scheduler.has_work == (len(events) == 1)
    return events[1] if len(events) > 1 else None


def test_stop_tokens_are_sent():
    for params in ({"ignore_eos": False}, {"stop_token_ids": (EOS,)}):
        end = ending(EOS, **params)
        assert end is not None and end.reason == "stop"


def test_what_is_no_stop_token_goes_on():
    assert ending(EOS, ignore_eos=True) is None
    assert ending(8, ignore_eos=False) is None


def test_length_ends_without_a_stop_token():
    end = ending(8, max_tokens=1)
    assert end is not None and end.reason == "length"


def test_a_stop_token_as_the_last_one_is_a_stop():
    end = ending(EOS, ignore_eos=False, max_tokens=1)
    assert end is not None and end.reason == "stop"


def test_stop_tokens_count_after_min_tokens():
    scheduler = Scheduler(make_config())
    scheduler.add(make_request(ignore_eos=False, min_tokens=2, max_tokens=5))
    assert len(answer(scheduler, EOS)) == 1
    assert len(answer(scheduler, EOS)) == 1
    assert answer(scheduler, EOS)[1].reason == "stop"


def test_logprobs_are_passed_on_when_asked_for():
    world = World(make_config())
    world.scheduler.add(make_request("with", logprobs=1))
    world.scheduler.add(make_request("without"))
    plan = world.scheduler.plan()
    assert plan is not None
    first, second = single_events(world.scheduler.commit(plan, world.engine.step(plan)))
    assert isinstance(first, Tokens) and isinstance(second, Tokens) and first.logprobs is not None
    assert first.logprobs[0].token_id == first.token_ids[0] == first.logprobs[0].top[0][0]
    assert second.logprobs is second.prompt_logprobs is None


def test_an_error_fails_the_whole_request_once_and_nobody_else():
    world = World(make_config(max_num_seqs=3))
    world.scheduler.add(make_request("bad", n=4, seed=5))
    world.scheduler.add(make_request("good"))
    world.engine.failing_seeds = {5}
    world.step()
    assert world.failed["bad"].error.kind == "GenerationError"
    assert "not finite" in world.failed["bad"].error.message
    world.run()
    assert list(world.finished) == [("good", 0)]


def test_an_error_of_a_later_choice_leaves_nothing_behind():
    world = World(make_config())
    world.scheduler.add(make_request("bad", n=3, max_tokens=1))
    plan = world.scheduler.plan()
    assert plan is not None
    results = (SequenceOutput((8,)), SequenceOutput(error="the logits are not finite"), SequenceOutput((8,)))
    events = world.scheduler.commit(plan, StepOutput(results))
    assert [type(event) for event in events] == [Tokens, Finished, Failed]
    world.scheduler.check_integrity()
    assert not world.scheduler.has_work and world.scheduler.stats().pages_used == 0


def test_abort_is_idempotent_and_knows_what_it_ended():
    world = World(make_config())
    assert not world.scheduler.abort(RequestId("r"))
    world.scheduler.add(make_request())
    assert world.scheduler.abort(RequestId("r"))
    assert not world.scheduler.abort(RequestId("r"))
    assert not world.scheduler.has_work


def test_abort_while_running_gives_everything_back_at_once():
    world = World(make_config())
    world.scheduler.add(make_request(n=2))
    world.step()
    assert world.scheduler.stats().pages_used == 4
    assert world.scheduler.abort(RequestId("r"))
    world.scheduler.check_integrity()
    assert world.scheduler.stats().pages_used == world.scheduler.stats().running == 0


def test_abort_between_plan_and_commit_keeps_pages_until_the_commit_and_drops_the_output():
    world = World(make_config())
    world.scheduler.add(make_request("a"))
    world.scheduler.add(make_request("b"))
    used = []

    def abort() -> None:
        assert world.scheduler.abort(RequestId("a"))
        assert not world.scheduler.abort(RequestId("a"))
        used.append(world.scheduler.stats().pages_used)
        world.scheduler.add(make_request("a", max_tokens=1))

    world.step(between=abort)
    assert used == [4]
    assert world.scheduler.stats().pages_used == 2
    assert not world.tokens["a", 0]
    world.run()
    assert len(world.tokens["a", 0]) == 1 and len(world.tokens["b", 0]) == 4


def test_a_finished_choice_and_an_abort_of_the_rest():
    world = World(make_config(max_num_seqs=1))
    world.scheduler.add(make_request(n=2, max_tokens=1))
    world.step()
    assert list(world.finished) == [("r", 0)]
    assert world.scheduler.abort(RequestId("r"))
    world.run()
    assert list(world.finished) == [("r", 0)]


def test_plan_and_commit_alternate():
    world = World(make_config())
    world.scheduler.add(make_request())
    plan = world.scheduler.plan()
    assert plan is not None
    with pytest.raises(AssertionError, match="was not committed"):
        world.scheduler.plan()
    output = world.engine.step(plan)
    world.scheduler.commit(plan, output)
    with pytest.raises(AssertionError, match="not the oldest plan in flight"):
        world.scheduler.commit(plan, output)
