"""Requests that are late end with their error in whatever state they are; all others go on."""

import pytest

from quire.core.errors import InvalidRequestError, RequestTimeoutError, revive
from quire.core.ids import RequestId
from quire.core.messages import Event, Failed

from .fake_engine import expected_output
from .world import World, make_config, make_request


def error_of(world: World, name: str) -> RequestTimeoutError:
    """The timeout error that a request ended with."""
    error = revive(world.failed[name].error)
    assert type(error) is RequestTimeoutError
    return error


def step_for(world: World, seconds: float) -> None:
    """Time passes, then a step."""
    world.clock.now += seconds
    world.step()


def test_a_request_that_waits_too_long_for_its_start_ends():
    world = World(make_config(max_num_seqs=1, queue_timeout=5.0))
    world.scheduler.add(make_request("runs", max_tokens=30))
    world.step()
    world.scheduler.add(make_request("waits", n=2))
    for _ in range(4):
        step_for(world, 1.0)
    assert not world.failed
    step_for(world, 1.0)
    assert "waited 5 s in the queue" in error_of(world, "waits").message
    assert world.scheduler.stats().timeouts_total == {"queue": 1}
    world.run()
    assert len(world.tokens["runs", 0]) == 30 and "runs" not in world.failed


def test_a_start_ends_the_queue_timeout_also_for_other_choices_and_after_preemption():
    world = World(make_config(max_num_seqs=1, queue_timeout=5.0))
    world.scheduler.add(make_request("r", n=2, max_tokens=3))
    world.step()
    (sequence,) = world.scheduler._running
    world.scheduler._preempt(sequence)
    world.clock.now += 100.0
    world.run()
    assert not world.failed and len(world.finished) == 2


@pytest.mark.parametrize(
    ("state", "steps", "words"),
    [("queue", 0, "still waiting"), ("prompt", 1, "prompt was being computed"), ("decode", 5, "3 tokens were")],
)
def test_a_request_past_its_own_timeout_ends_in_any_state(state, steps, words):
    world = World(make_config(max_num_seqs=2, max_batch_tokens=8))
    other = make_request("other", prompt=(3, 4), max_tokens=20)
    if state == "queue":
        world.scheduler.add(make_request("busy", max_tokens=30, prompt=(1,)))
    world.scheduler.add(other)
    world.step()
    world.scheduler.add(make_request("late", prompt=range(1, 21), timeout=10.0, max_tokens=10))
    for _ in range(steps):
        world.step()
    step_for(world, 10.0)
    error = error_of(world, "late")
    assert words in error.message and "10 s" in error.message and error.param == "timeout"
    assert world.scheduler.stats().timeouts_total == {"request": 1}
    world.run()
    assert world.tokens["other", 0] == expected_output(other, 0, world.config)[0]


def test_a_request_that_gets_late_while_it_is_in_flight():
    world = World(make_config())
    world.scheduler.add(make_request("late", timeout=1.0, n=2))
    world.scheduler.add(make_request("other"))
    events: list[Event] = []

    def meanwhile() -> None:
        world.clock.now += 2.0
        events.extend(world.scheduler.tend())

    world.step(between=meanwhile)
    (failed,) = events
    assert isinstance(failed, Failed) and failed.error.kind == "RequestTimeoutError" and failed.request_id == "late"
    assert not world.tokens["late", 0], "nothing comes after the error"
    world.run()
    assert list(world.finished) == [("other", 0)]


def test_who_ends_in_time_or_is_aborted_is_not_told_later():
    world = World(make_config(queue_timeout=50.0))
    for name in ("ends", "aborted"):
        world.scheduler.add(make_request(name, timeout=10.0))
    world.scheduler.abort(RequestId("aborted"))
    world.run()
    world.clock.now += 1000.0
    assert world.scheduler.tend() == [] and not world.failed
    world.scheduler.add(make_request("aborted", timeout=10.0))
    world.run()
    assert not world.failed and len(world.finished) == 2


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf"), 1e6])
def test_timeouts_out_of_range_are_refused(timeout):
    with pytest.raises(InvalidRequestError, match="timeout must be > 0"):
        make_request(timeout=timeout)
