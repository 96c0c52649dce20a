"""Sampling parameters are checked in one place; errors survive the process border."""

import math
from typing import Any

import msgspec
import pytest

from quire.core.config import EngineConfig, parse_size
from quire.core.errors import (
    ConfigError,
    ContextLengthError,
    InvalidRequestError,
    OverloadedError,
    describe,
    revive,
)
from quire.core.ids import RequestId
from quire.core.messages import ClientMessage, Submit
from quire.core.pruning import PruneParams
from quire.core.request import MAX_CACHE_SALT, Request, SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("logprobs", 21),
        ("n", 0),
        ("n", 1000),
        ("seed", 2**64),
        ("logit_bias", {3: 101.0}),
        ("stop_token_ids", tuple(range(300))),
    ],
)
def test_out_of_range_values_name_their_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field


def test_min_tokens_above_max_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="min_tokens"):
        SamplingParams(max_tokens=2, min_tokens=3)


def test_request_survives_the_wire() -> None:
    params = SamplingParams(temperature=0.5, logit_bias={7: -1.0}, stop_token_ids=(1, 2), seed=2**64 - 1)
    request = Request(id=RequestId("r"), prompt_ids=(1, 2, 3), params=params, seed=2**64 - 1, cache_salt="ü")
    data = msgspec.msgpack.encode(Submit(request))
    assert msgspec.msgpack.decode(data, type=ClientMessage) == Submit(request)


def test_a_salt_has_a_limit() -> None:
    assert Request(id=RequestId("r"), prompt_ids=(1,), cache_salt="x" * MAX_CACHE_SALT).cache_salt
    with pytest.raises(InvalidRequestError) as caught:
        Request(id=RequestId("r"), prompt_ids=(1,), cache_salt="x" * (MAX_CACHE_SALT + 1))
    assert caught.value.param == "cache_salt"


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequestError("bad", param="top_p"),
        ContextLengthError("too long"),
        OverloadedError("full", retry_after=3.0),
    ],
)
def test_errors_survive_the_wire(error: InvalidRequestError | OverloadedError) -> None:
    again = revive(describe(error))
    assert type(again) is type(error)
    assert (again.message, again.param, again.retry_after) == (error.message, error.param, error.retry_after)


@pytest.mark.parametrize(
    ("text", "size"), [("4GiB", 4 * 2**30), ("512MiB", 512 * 2**20), ("1.5g", 1_500_000_000), ("1000", 1000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "4 gigs", "-1GiB", "1e9"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_size(text)


@pytest.mark.parametrize(
    "settings",
    [{"max_num_seqs": 0}, {"page_size": 0}, {"max_model_len": 1}, {"kv_memory": 0}, {"max_batch_tokens": 8}],
)
def test_impossible_settings(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        EngineConfig(model="m", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"device": "tpu"}, "device: Invalid enum value 'tpu'"),
        ({"kv_memory": "1GiB"}, "kv_memory: Expected `int"),
        ({"page_sise": 8}, "there is no setting `page_sise`"),
        ({"page_size": 0}, "page_size must be at least 1"),
    ],
)
def test_settings_of_a_program_are_checked_by_name_and_type(settings: dict[str, object], reason: str) -> None:
    prune = PruneParams(policy="window")
    good = EngineConfig.of({"model": "m", "max_cache_ttl": 3, "prune": prune})
    assert good == EngineConfig(model="m", max_cache_ttl=3.0, prune=prune)
    with pytest.raises(ConfigError, match=reason):
        EngineConfig.of({"model": "m"} | settings)
