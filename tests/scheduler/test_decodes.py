"""Steady decodes: who travels as a row of columns, who does not, and that it makes no difference."""

import msgspec
import numpy as np
import pytest

from quire.core.ids import RequestId
from quire.core.messages import Decoded, EngineStats, Failed, Finished, StepReport, Tokens, single_events
from quire.core.plan import NO_TOKEN, NON_FINITE, SequenceOutput, StepOutput
from quire.scheduler.scheduler import Scheduler

from .fake_text import expected_output
from .world import EOS, World, make_config, make_request


def decoding(**requests: dict) -> Scheduler:
    """A scheduler whose requests have each sampled the token 9."""
    scheduler = Scheduler(make_config())
    for name, params in requests.items():
        scheduler.add(make_request(name, **params))
    plan = scheduler.plan()
    assert plan is not None and not len(plan.decodes)
    scheduler.commit(plan, StepOutput(tuple(SequenceOutput((9,)) for _ in plan.sequences)))
    return scheduler


def decode(scheduler: Scheduler, *token_ids: int) -> list:
    """One step in which the rows of the decode batch sample these tokens; the commit's events."""
    plan = scheduler.plan()
    assert plan is not None and not plan.sequences and len(plan.decodes) == len(token_ids)
    events = scheduler.commit(plan, StepOutput((), decoded=np.array(token_ids, np.int32)))
    scheduler.check_integrity()
    return events


def test_sequences_decode_as_columns_from_their_second_token_on():
    scheduler = decoding(a={}, b={"prompt": (5, 6)})
    plan = scheduler.plan()
    assert plan is not None and not plan.sequences and plan.num_tokens == 2
    assert plan.decodes.starts.tolist() == [3, 2] and plan.decodes.token_ids.tolist() == [9, 9]
    assert len(set(plan.decodes.slots.tolist())) == 2
    (event,) = scheduler.commit(plan, StepOutput((), decoded=np.array([7, 8], np.int32)))
    assert event == Decoded([RequestId("a"), RequestId("b")], [0, 0], [7, 8])
    plan = scheduler.plan()
    assert plan is not None and plan.decodes.token_ids.tolist() == [7, 8]


def test_who_wants_log_probabilities_is_no_steady_decode():
    world = World(make_config())
    world.scheduler.add(make_request("plain"))
    world.scheduler.add(make_request("scored", logprobs=0))
    world.step()
    plan = world.step()
    assert plan is not None and len(plan.decodes) == len(plan.sequences) == 1
    world.run()
    assert len(world.finished) == 2


@pytest.mark.parametrize(
    "params, token, reason",
    [
        ({"max_tokens": 2}, 8, "length"),
        ({"ignore_eos": False}, EOS, "stop"),
        ({"stop_token_ids": (3, 4)}, 4, "stop"),
        ({"stop_token_ids": (3, 4), "min_tokens": 2}, 4, None),
        ({}, EOS, None),
    ],
)
def test_a_row_ends_alone(params, token, reason):
    scheduler = decoding(a=params, b={})
    plain, *end = single_events(decode(scheduler, token, 8))
    if reason is None:
        assert [event.token_ids for event in (plain, *end) if isinstance(event, Tokens)] == [[token], [8]]
        return
    assert plain == Tokens(RequestId("b"), 0, [8]) and end[0] == Tokens(RequestId("a"), 0, [token])
    assert isinstance(end[1], Finished) and end[1].reason == reason and len(end) == 2
    assert decode(scheduler, 7) == [Decoded([RequestId("b")], [0], [7])]


def test_a_row_without_a_token_fails_its_request_and_no_other():
    scheduler = decoding(a={"n": 2}, b={})
    plain, failed = decode(scheduler, NO_TOKEN, 7, 8)
    assert plain == Decoded([RequestId("a"), RequestId("b")], [1, 0], [7, 8])
    assert isinstance(failed, Failed) and failed.request_id == "a" and NON_FINITE in failed.error.message
    assert decode(scheduler, 7) == [Decoded([RequestId("b")], [0], [7])]


def test_a_row_aborted_between_plan_and_commit_gets_nothing():
    scheduler = decoding(a={}, b={}, c={})
    plan = scheduler.plan()
    assert plan is not None
    scheduler.abort(RequestId("a"))
    scheduler.check_integrity()
    events = scheduler.commit(plan, StepOutput((), decoded=np.array([6, 7, 8], np.int32)))
    assert events == [Decoded([RequestId("b"), RequestId("c")], [0, 0], [7, 8])]
    scheduler.check_integrity()
    plan = scheduler.plan()
    assert plan is not None and sorted(plan.decodes.token_ids.tolist()) == [7, 8]


def test_a_budget_below_the_batch_goes_to_the_oldest():
    world = World(make_config(max_batch_tokens=3, num_pages=200))
    requests = [make_request(name, prompt=(7,), max_tokens=20, seed=ord(name)) for name in "abcde"]
    for request in requests:
        world.scheduler.add(request)
    world.run()
    assert list(world.finished) == [(name, 0) for name in "abcde"]
    for request in requests:
        assert world.tokens[request.id, 0] == expected_output(request, 0, world.config)[0]


def test_columns_cross_the_border_between_processes():
    report = StepReport([Decoded([RequestId("a")], [1], [5]), Tokens(RequestId("b"), 0, [6])], EngineStats())
    copy = msgspec.msgpack.decode(msgspec.msgpack.encode(report), type=StepReport)
    assert copy == report
    assert list(single_events(copy.events)) == [Tokens(RequestId("a"), 1, [5]), Tokens(RequestId("b"), 0, [6])]
