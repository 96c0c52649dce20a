"""What is refused, why, and that a refusal leaves nothing behind."""

import pytest

from quire.core.errors import ConfigError, ContextLengthError, InvalidRequestError, OverloadedError, QuireError
from quire.core.ids import RequestId
from quire.scheduler.scheduler import Scheduler

from .world import FakeClock, World, make_config, make_request


def refusal(request, **changes) -> QuireError:
    """The error with which a fresh scheduler refuses the request."""
    scheduler = Scheduler(make_config(**changes))
    with pytest.raises(QuireError) as caught:
        scheduler.add(request)
    assert not scheduler.has_work
    return caught.value


@pytest.mark.parametrize(
    ("request_", "param", "words"),
    [
        (make_request(prompt=()), "prompt", "the prompt is empty"),
        (make_request(prompt=(1, 50)), "prompt", "token id 50, but ids go from 0 to 49"),
        (make_request(prompt=(-1,)), "prompt", "token id -1"),
        (make_request(stop_token_ids=(3, 60)), "stop_token_ids", "token id 60"),
        (make_request(logit_bias={50: 1.0}), "logit_bias", "token id 50"),
    ],
)
def test_wrong_values_are_named(request_, param, words):
    error = refusal(request_)
    assert type(error) is InvalidRequestError
    assert error.param == param
    assert words in error.message


def test_a_prompt_without_room_for_a_token_names_both_lengths():
    config = {"max_model_len": 4096, "num_pages": 10_000}
    error = refusal(make_request(prompt=(1,) * 5000, max_tokens=None), **config)
    assert type(error) is ContextLengthError
    assert error.message.startswith("the prompt has 5,000 tokens but the model's context")
    assert error.message.endswith("at most 4,096 tokens")
    assert type(refusal(make_request(prompt=(1,) * 4096, max_tokens=None), **config)) is ContextLengthError


def test_output_that_does_not_fit_the_context_is_refused_not_clipped():
    error = refusal(make_request(prompt=(1,) * 60, max_tokens=5))
    assert type(error) is ContextLengthError
    assert error.param == "max_tokens"
    assert "60 tokens" in error.message and "5 more" in error.message and "64 tokens" in error.message
    Scheduler(make_config()).add(make_request(prompt=(1,) * 60, max_tokens=4))


def test_what_can_never_fit_the_pool_is_refused():
    # 2 heads, 5 pages of 4 each: 20 entries, and the last token needs none.
    error = refusal(make_request(prompt=(1,) * 12, max_tokens=10), num_pages=11)
    assert type(error) is ContextLengthError
    assert "the KV cache" in error.message and "21 tokens" in error.message
    world = World(make_config(num_pages=11))
    world.scheduler.add(make_request(prompt=(1,) * 12, max_tokens=9))
    world.run()
    assert len(world.tokens["r", 0]) == 9


def test_without_max_tokens_the_output_goes_to_the_end_of_context_or_pool():
    for num_pages, length in ((100, 64), (11, 21)):
        world = World(make_config(num_pages=num_pages))
        world.scheduler.add(make_request(max_tokens=None))
        world.run()
        assert len(world.tokens["r", 0]) == length - 3
        assert world.finished["r", 0].reason == "length"


def test_a_window_lets_longer_sequences_fit():
    config = make_config(num_pages=16, windows=(4, 4), max_batch_tokens=8, max_model_len=60)
    assert config.max_length == 60
    assert make_config(num_pages=16, max_batch_tokens=8, max_model_len=60).max_length == 33


def test_pages_needed_counts_layers_and_heads():
    config = make_config(windows=(None, 8), num_kv_heads=3, max_batch_tokens=8, num_pages=100)
    assert config.pages_needed(1) == 3 * (1 + 1)
    assert config.pages_needed(9) == 3 * (3 + 3)
    assert config.pages_needed(50) == 3 * (13 + 5)


def test_a_pool_too_small_for_one_token_is_a_configuration_error():
    with pytest.raises(ConfigError, match="has 1 pages but one token alone takes 2"):
        make_config(num_pages=1)


def test_an_id_in_use_is_refused_and_free_again_after_the_end():
    world = World(make_config())
    world.scheduler.add(make_request("a"))
    with pytest.raises(InvalidRequestError, match="'a' is already being served"):
        world.scheduler.add(make_request("a"))
    world.run()
    world.scheduler.add(make_request("a"))
    assert world.scheduler.abort(RequestId("a"))


def test_a_full_queue_refuses_all_choices_at_once():
    scheduler = Scheduler(make_config(max_waiting=3))
    scheduler.add(make_request("a", n=2))
    with pytest.raises(OverloadedError, match="2 sequences wait") as caught:
        scheduler.add(make_request("b", n=2))
    assert caught.value.retry_after == 1.0
    assert scheduler.stats().waiting == 2
    scheduler.add(make_request("b"))
    assert scheduler.abort(RequestId("a")) and scheduler.stats().waiting == 1


def test_more_choices_than_places_can_never_be_taken():
    error = refusal(make_request(n=4), max_waiting=3)
    assert type(error) is InvalidRequestError and error.param == "n"


def test_retry_after_follows_the_rate_at_which_sequences_start():
    world = World(make_config(max_waiting=4, max_num_seqs=1))
    for name in "abcd":
        world.scheduler.add(make_request(name, max_tokens=1))
    for _ in range(2):
        world.step()
        world.clock.now += 5.0
    for name in "ef":
        world.scheduler.add(make_request(name))
    for choices, seconds in ((1, 5.0), (3, 15.0), (4, 20.0)):
        with pytest.raises(OverloadedError) as caught:
            world.scheduler.add(make_request("g", n=choices))
        assert caught.value.retry_after == seconds
    world.clock.now += 1000.0
    with pytest.raises(OverloadedError) as caught:
        world.scheduler.add(make_request("g"))
    assert caught.value.retry_after == 60.0


def test_queue_seconds_end_with_the_first_step():
    clock = FakeClock()
    world = World(make_config(max_num_seqs=1))
    world.scheduler = Scheduler(world.config, clock)
    world.scheduler.add(make_request("a", max_tokens=2))
    world.scheduler.add(make_request("b", max_tokens=2))
    for _ in range(4):
        clock.now += 1.5
        world.step()
    assert world.finished["a", 0].queue_seconds == 1.5
    assert world.finished["b", 0].queue_seconds == 4.5
