"""The prefix cache seen from a client: salt and time to live that it sends, cached and pinned tokens of its usage."""

from collections.abc import Iterable

import httpx
import pytest
from typer.testing import CliRunner

from quire.core.messages import Finished, Tokens
from quire.core.request import MAX_CACHE_SALT, Request
from quire.server.cli import app
from quire.server.serving import ServeOptions
from quire.server.text import Tokenizer

from .conftest import events_of
from .fake_client import FakeClient, Script, Step


def says_cached(tokens: list[int], *cached: int) -> Script:
    """Choice i gets `tokens`, of whose prompt `cached[i]` tokens were known."""

    def script(request: Request) -> Iterable[Step]:
        for index in range(request.params.n):
            yield Tokens(request.id, index, tokens[:1], cached_tokens=cached[index])
            yield Tokens(request.id, index, tokens[1:])
            yield Finished(request.id, index, "stop")

    return script


@pytest.mark.parametrize(
    ("url", "prompt"),
    [
        ("/v1/completions", {"prompt": "hello"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
    ],
)
async def test_usage_counts_the_prompt_once(
    http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer, url: str, prompt: dict[str, object]
) -> None:
    client.script = says_cached(tokenizer.encode("hello world", False), 3, 16)
    whole = (await http.post(url, json=prompt | {"n": 2})).json()
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    body = prompt | {"n": 2, "stream": True, "stream_options": {"include_usage": True}}
    events = events_of((await http.post(url, json=body)).text)
    assert events[-2]["usage"] == whole["usage"]


async def test_usage_of_several_prompts_and_of_one_that_a_stop_string_ended(
    http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer
) -> None:
    client.script = says_cached(tokenizer.encode("hello world", False), 3)
    body = {"prompt": ["hello", "hello again"], "stop": "wor"}
    usage = (await http.post("/v1/completions", json=body)).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 6}


async def test_the_salt_reaches_the_engine(http: httpx.AsyncClient, client: FakeClient) -> None:
    for salt in ("tenant", "", None):
        assert (await http.post("/v1/completions", json={"prompt": "hello", "cache_salt": salt})).status_code == 200
    messages = [{"role": "user", "content": "hello"}]
    await http.post("/v1/chat/completions", json={"messages": messages, "cache_salt": "x" * MAX_CACHE_SALT})
    assert [request.cache_salt for request in client.requests] == ["tenant", "", "", "x" * MAX_CACHE_SALT]


@pytest.mark.parametrize("salt", [5, ["a"], "x" * (MAX_CACHE_SALT + 1)])
async def test_a_salt_is_a_short_string(http: httpx.AsyncClient, client: FakeClient, salt: object) -> None:
    response = await http.post("/v1/completions", json={"prompt": "hello", "cache_salt": salt})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "cache_salt")
    assert client.requests == []


async def test_a_time_to_live_reaches_the_engine_and_usage_says_what_is_pinned(
    http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer
) -> None:
    def script(request: Request) -> Iterable[Step]:
        pinned = 16 if request.cache_ttl else 0
        for index in range(request.params.n):
            yield Tokens(request.id, index, tokenizer.encode("hello", False), pinned_tokens=pinned)
            yield Finished(request.id, index, "stop")

    client.script = script
    details = []
    for seconds in (600, 0.5, 0, None):
        body = {"prompt": "hello", "n": 2, "cache_ttl": seconds}
        details.append((await http.post("/v1/completions", json=body)).json()["usage"]["prompt_tokens_details"])
    assert [request.cache_ttl for request in client.requests] == [600.0, 0.5, 0.0, 0.0]
    kept = {"cached_tokens": 0, "pinned_tokens": 16}
    assert details == [kept, kept, {"cached_tokens": 0}, {"cached_tokens": 0}]
    chat = {"messages": [{"role": "user", "content": "hello"}], "cache_ttl": 5, "stream": True}
    response = await http.post("/v1/chat/completions", json=chat | {"stream_options": {"include_usage": True}})
    assert events_of(response.text)[-2]["usage"]["prompt_tokens_details"] == kept


@pytest.mark.parametrize("seconds", ["-1", "NaN", "Infinity", "1e999", '"soon"', "[1]"])
async def test_a_time_to_live_is_a_number_of_seconds(http: httpx.AsyncClient, client: FakeClient, seconds: str) -> None:
    body = f'{{"prompt": "hello", "cache_ttl": {seconds}}}'
    response = await http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400 and "error" in response.json() and client.requests == []


@pytest.mark.parametrize(
    ("arguments", "environment", "kept"),
    [
        ([], {}, True),
        (["--no-prefix-cache"], {}, False),
        ([], {"QUIRE_PREFIX_CACHE": "0"}, False),
        (["--prefix-cache"], {"QUIRE_PREFIX_CACHE": "0"}, True),
    ],
)
def test_the_cache_is_on_unless_switched_off(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], environment: dict[str, str], kept: bool
) -> None:
    started: list[ServeOptions] = []
    monkeypatch.setattr("quire.server.serving.serve", started.append)
    result = CliRunner().invoke(app, ["serve", *arguments], env=environment)
    assert result.exit_code == 0, result.output
    assert started[0].engine.prefix_cache is kept


def test_tiers_are_set_up_by_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[ServeOptions] = []
    monkeypatch.setattr("quire.server.serving.serve", started.append)
    options = ["--swap-memory", "2GiB", "--max-cache-ttl", "60", "--cache-file", "prefixes"]
    assert CliRunner().invoke(app, ["serve", *options]).exit_code == 0
    engine = started[0].engine
    assert (engine.swap_memory, engine.max_cache_ttl, engine.cache_file) == (2**31, 60.0, "prefixes")
    for wrong in (["--swap-memory", "much"], ["--max-cache-ttl", "-1"], ["--max-cache-ttl", "inf"]):
        assert CliRunner().invoke(app, ["serve", *wrong]).exit_code != 0
    assert len(started) == 1
