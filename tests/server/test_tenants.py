"""Whose a request is: API keys and their names, the `user` field, isolation; priority and timeout on their way."""

from collections.abc import Iterable
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from quire.core.errors import ConfigError, QuireError, RequestTimeoutError
from quire.core.messages import EngineStats, Tokens
from quire.core.request import Request
from quire.server.cli import app
from quire.server.keys import ApiKey, find_key, parse_keys, short_hash
from quire.server.serving import ServeOptions

from .conftest import HttpFactory, events_of
from .fake_client import FakeClient, Step
from .test_ops import samples

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPTS: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"prompt": ["one", "two"]}),
    (CHAT, {"messages": [{"role": "user", "content": "hi"}]}),
]


@pytest.mark.parametrize(
    ("text", "tenant", "key"),
    [
        ("team-1=secret", "team-1", "secret"),
        ("a=b=c", "a", "b=c"),
        ("secret", short_hash("secret"), "secret"),
        ("c2VjcmV0==", short_hash("c2VjcmV0=="), "c2VjcmV0=="),
        ("c2VjcmV0=", short_hash("c2VjcmV0="), "c2VjcmV0="),
        ("=x", short_hash("=x"), "=x"),
        ("two words=x", short_hash("two words=x"), "two words=x"),
    ],
)
def test_keys_with_and_without_a_name(text: str, tenant: str, key: str) -> None:
    assert ApiKey.parse(text) == ApiKey(tenant, key)
    assert find_key(key.encode(), parse_keys(["first", text])) == ApiKey(tenant, key)
    assert find_key(key.encode(), parse_keys(["first"], admin=[text])) == ApiKey(tenant, key, admin=True)
    assert find_key(b"wrong", parse_keys(["first", text])) is None


def test_empty_and_repeated_keys_are_refused() -> None:
    for texts in ([""], ["a=x", "b=x"], ["x", "x"]):
        with pytest.raises(ConfigError, match="API key"):
            parse_keys(texts)
    with pytest.raises(ConfigError, match="API key"):
        parse_keys(["x"], admin=["boss=x"])


@pytest.mark.parametrize(("url", "prompt"), PROMPTS)
async def test_the_tenant_is_the_key_then_the_user(
    make_http: HttpFactory, client: FakeClient, url: str, prompt: dict[str, Any]
) -> None:
    async def tenants(http: httpx.AsyncClient, key: str = "", **fields: Any) -> set[tuple[str, str]]:
        client.requests.clear()
        response = await http.post(url, json=prompt | fields, headers={"Authorization": f"Bearer {key}"})
        assert response.status_code == 200
        return {(request.tenant, request.namespace) for request in client.requests}

    keys = parse_keys(["team=one", "team=uno", "two"])
    guarded, isolated = make_http(api_keys=keys), make_http(api_keys=keys, isolate_keys=True)
    assert await tenants(make_http()) == {("", "")}
    assert await tenants(make_http(), user="me") == {(short_hash("me"), "")} != await tenants(make_http(), user="you")
    assert await tenants(guarded, "one", user="me") == await tenants(guarded, "uno") == {("team", "")}
    assert await tenants(guarded, "two") == {(short_hash("two"), "")}
    assert await tenants(isolated, "one", user="me") == {("team", "team")}
    assert await tenants(isolated, "two") == {(short_hash("two"), short_hash("two"))}


@pytest.mark.parametrize(("url", "prompt"), PROMPTS)
async def test_priority_and_timeout_reach_the_engine(
    http: httpx.AsyncClient, client: FakeClient, url: str, prompt: dict[str, Any]
) -> None:
    await http.post(url, json=prompt)
    assert {(request.priority, request.timeout) for request in client.requests} == {(0, None)}
    client.requests.clear()
    assert (await http.post(url, json=prompt | {"priority": -3, "timeout": 2, "n": 2})).status_code == 200
    assert {(request.priority, request.timeout) for request in client.requests} == {(-3, 2.0)}


async def test_a_stream_that_gets_late_ends_with_the_error(http: httpx.AsyncClient, client: FakeClient) -> None:
    def late(request: Request) -> Iterable[Step | QuireError]:
        yield Tokens(request.id, 0, [70])
        yield RequestTimeoutError("the request did not end in time", param="timeout")

    client.script = late
    response = await http.post(COMPLETIONS, json={"prompt": "a", "stream": True, "n": 2, "timeout": 1})
    assert response.status_code == 200
    *_, last = events_of(response.text)
    assert last["error"]["code"] == "request_timeout" and last["error"]["type"] == "timeout_error"


async def test_faults_and_timeouts_are_counted(http: httpx.AsyncClient, client: FakeClient) -> None:
    [listener] = client.listeners
    before = await samples(http)
    assert before["quire:watchdog_total", (("reason", "overtaken"),)] == 0
    listener(EngineStats(steps_total=5, timeouts_total={"queue": 2}, waiting_tokens=70))
    listener(EngineStats(steps_total=9, timeouts_total={"queue": 3, "request": 1}, waiting_priorities={"below": 4}))
    listener(EngineStats(steps_total=1, timeouts_total={"queue": 1}, watchdog_total={"stalled": 1}, page_leaks_total=2))
    found = await samples(http)
    assert found["quire:request_timeouts_total", (("kind", "queue"),)] == 4
    assert found["quire:request_timeouts_total", (("kind", "request"),)] == 1
    assert found["quire:watchdog_total", (("reason", "stalled"),)] == 1
    assert found["quire:page_leaks_total", ()] == 2
    assert found["quire:waiting_prompt_tokens", ()] == 0
    assert found["quire:requests_waiting_by_priority", (("priority", "below"),)] == 0


def served(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> ServeOptions:
    """What `quire serve` with these arguments would serve. Raises what it raises."""
    asked: list[ServeOptions] = []
    monkeypatch.setattr("quire.server.serving.serve", asked.append)
    result = CliRunner().invoke(app, ["serve", *arguments])
    if result.exception is not None:
        raise result.exception
    return asked[0]


def test_options_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = served(monkeypatch)
    assert (plain.engine.policy, plain.http.api_keys, plain.http.isolate_keys) == ("fcfs", (), False)
    assert plain.engine.max_itl_ms is plain.engine.max_waiting_tokens is plain.engine.queue_timeout is None
    limits = ["--max-itl-ms", "40", "--max-waiting-tokens", "5000", "--queue-timeout", "2.5"]
    keys = ["--api-key", "a=x", "--api-key", "y", "--isolate-keys"]
    full = served(monkeypatch, "--policy", "fair", *limits, *keys)
    engine = full.engine
    assert (engine.policy, engine.max_itl_ms, engine.max_waiting_tokens, engine.queue_timeout) == (
        "fair",
        40,
        5000,
        2.5,
    )
    assert (full.http.api_keys, full.http.isolate_keys) == (parse_keys(["a=x", "y"]), True)


@pytest.mark.parametrize(
    "arguments",
    [("--isolate-keys",), ("--max-itl-ms", "0"), ("--max-waiting-tokens", "-1"), ("--queue-timeout", "nan")],
)
def test_options_that_cannot_work_are_refused(monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError):
        served(monkeypatch, *arguments)
