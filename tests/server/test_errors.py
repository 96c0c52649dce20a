"""Whatever is wrong with a request ends as a status and the OpenAI error body, and the server goes on."""

import json
import logging
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.core import errors
from quire.core.errors import (
    AuthenticationError,
    ConfigError,
    ContextLengthError,
    EngineUnavailableError,
    GenerationError,
    InvalidRequestError,
    ModelLoadError,
    ModelNotFoundError,
    OverloadedError,
    QuireError,
    RequestTimeoutError,
    RequestTooLargeError,
)
from quire.core.messages import Finished, Tokens
from quire.server.errors import ERROR_TABLE
from quire.server.text import Tokenizer

from .conftest import HttpFactory, events_of
from .fake_client import FakeClient, says

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
IMAGE = [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]


def check_body(response: httpx.Response, status: int) -> dict[str, Any]:
    """The `error` of a refused request."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert len(response.content) < 2000
    return body["error"]


BAD_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": "", "add_special_tokens": False}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["hello", 5]}, "prompt"),
    ({"prompt": [5, "hello"]}, "prompt"),
    ({"prompt": [True, 5]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [2**40]}, "prompt"),
    ({"prompt": [5] * 1000}, "prompt"),
    ({"prompt": ["a"] * 1025}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": [1]}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 2**40}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"n": "2"}, "n"),
    ({"seed": 2**70}, "seed"),
    ({"min_tokens": 20, "max_tokens": 5}, "min_tokens"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": {"5": "1"}}, "logit_bias.5"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop": "x" * 2000}, "stop"),
    ({"stop_token_ids": ["1"]}, "stop_token_ids"),
    ({"stop_token_ids": list(range(300))}, "stop_token_ids"),
    ({"stream": "yes"}, "stream"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"echo": "yes"}, "echo"),
    ({"suffix": "end"}, "suffix"),
    ({"best_of": 3}, "best_of"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
    ({"model": 5}, "model"),
    ({"priority": 1001}, "priority"),
    ({"priority": -1001}, "priority"),
    ({"priority": 0.5}, "priority"),
    ({"priority": "high"}, "priority"),
    ({"timeout": 0}, "timeout"),
    ({"timeout": -3.5}, "timeout"),
    ({"timeout": 1e9}, "timeout"),
    ({"timeout": "5"}, "timeout"),
    ({"user": 5}, "user"),
    ({"max_completion_tokens": 5}, "max_completion_tokens"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"store": True}, "store"),
]
BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages.0"),
    ({"messages": [{"content": "hi"}]}, "messages.0.role"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "contents": "hi"}]}, "messages.0.content"),
    ({"messages": [{"role": "assistant"}, {"role": "system", "content": None}]}, "messages.1.content"),
    ({"messages": [{"role": "user", "content": IMAGE}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages.0.tool_calls"),
    ({"messages": [{"role": "user", "content": "long " * 400}]}, "messages"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "grammar"}}, "response_format.type"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"logit_processors": ["x"]}, "logit_processors"),
    ({"guided_json": {}}, "guided_json"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"moderation": {"model": "x"}}, "moderation"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"continue_final_message": True}, "messages"),
    ({"echo": True}, "echo"),
    ({"prompt": "hi"}, "prompt"),
    ({"store": True}, "store"),
    ({"verbosity": "low"}, "verbosity"),
    ({"reasoning_effort": 5}, "reasoning_effort"),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("fields", "param"), BAD_COMPLETIONS, ids=lambda value: str(value)[:40])
async def test_bad_completions(
    http: httpx.AsyncClient, client: FakeClient, fields: dict[str, Any], param: str, stream: bool
) -> None:
    if "stream_options" in fields or "stream" in fields:
        stream = bool(fields.get("stream"))
    # Not httpx's own encoder: it refuses what some of these send.
    body = json.dumps({"model": "tiny", "prompt": "hello", "stream": stream} | fields)
    error = check_body(await http.post(COMPLETIONS, content=body), 400)
    assert error["param"] == param
    assert client.requests == []
    assert (await http.post(COMPLETIONS, json={"prompt": "hello"})).status_code == 200


@pytest.mark.parametrize(("fields", "param"), BAD_CHATS, ids=lambda value: str(value)[:40])
async def test_bad_chats(http: httpx.AsyncClient, client: FakeClient, fields: dict[str, Any], param: str) -> None:
    error = check_body(await http.post(CHAT, json={"model": "tiny", "messages": MESSAGES} | fields), 400)
    assert error["param"] == param
    assert client.requests == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"prompt": "hello", "temperature": NaN}',
        b'{"prompt": "hello", "temperature": Infinity}',
        b'{"prompt": "hello", "temperature": 1e400}',
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
        b'{"prompt":' * 50_000,
        b'{"prompt": "hello", "chat_template_kwargs": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
        b"prompt=hello",
    ],
    ids=lambda body: repr(body[:45]),
)
async def test_bad_json(http: httpx.AsyncClient, client: FakeClient, body: bytes) -> None:
    for url in (COMPLETIONS, CHAT, "/tokenize", "/detokenize"):
        check_body(await http.post(url, content=body), 400)
    assert client.requests == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = sorted({name for fields, _ in BAD_COMPLETIONS + BAD_CHATS for name in fields} | {"user", "ignore_eos"})


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4), st.sampled_from([COMPLETIONS, CHAT]))
async def test_no_body_breaks_the_server(http: httpx.AsyncClient, fields: dict[str, Any], url: str) -> None:
    response = await http.post(url, content=json.dumps({"prompt": "hello", "messages": MESSAGES} | fields))
    assert response.status_code in (200, 400, 404), response.text


async def test_messages_stay_short(http: httpx.AsyncClient) -> None:
    check_body(await http.post(COMPLETIONS, json={"prompt": ["x" * 100_000, {}], "stop": 5}), 400)
    check_body(await http.post(CHAT, json={"messages": [{"role": "x" * 10_000}] * 100}), 400)
    check_body(await http.post(CHAT, json={"messages": [1] * 1_000_000}), 400)
    check_body(
        await http.post(COMPLETIONS, json={"prompt": "a", "logit_bias": dict.fromkeys(range(100_000), "x")}), 400
    )
    check_body(await http.post(COMPLETIONS, json={"prompt": "a", "model": "x" * 100_000}), 404)


async def test_unknown_models_and_routes(http: httpx.AsyncClient) -> None:
    error = check_body(await http.post(COMPLETIONS, json={"model": "other", "prompt": "a"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    check_body(await http.post(CHAT, json={"model": "other", "messages": MESSAGES}), 404)
    check_body(await http.get("/v1/models/other"), 404)
    check_body(await http.get("/nowhere"), 404)
    assert check_body(await http.get(COMPLETIONS), 405)["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    ("failure", "status", "code", "retry_after"),
    [
        (InvalidRequestError("token out of range", param="prompt"), 400, None, None),
        (ContextLengthError("too long"), 400, "context_length_exceeded", None),
        (OverloadedError("queue full", retry_after=2.3), 429, "overloaded", "3"),
        (OverloadedError("queue full"), 429, "overloaded", "1"),
        (EngineUnavailableError("restarting"), 503, "engine_unavailable", "5"),
        (RequestTimeoutError("waited 5 s", param="timeout"), 504, "request_timeout", None),
        (GenerationError("non-finite logits"), 500, "generation_failed", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_refusals_by_the_engine_are_real_statuses(
    http: httpx.AsyncClient,
    client: FakeClient,
    failure: QuireError,
    status: int,
    code: str | None,
    retry_after: str | None,
    stream: bool,
) -> None:
    client.script = lambda request: [failure]
    for prompt in ("one", ["one", "two"]):
        response = await http.post(COMPLETIONS, json={"prompt": prompt, "stream": stream})
        error = check_body(response, status)
        assert (error["message"], error["code"]) == (failure.message, code)
        assert response.headers.get("retry-after") == retry_after


@pytest.mark.parametrize("failure", [EngineUnavailableError("the engine died"), RuntimeError("secret detail")])
async def test_failures_within_a_stream(
    http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer, failure: Exception
) -> None:
    first = tokenizer.encode("hello", False)
    client.script = lambda request: [Tokens(request.id, 0, first), failure]
    response = await http.post(CHAT, json={"messages": MESSAGES, "stream": True})
    assert response.status_code == 200
    events = events_of(response.text)
    assert events[1]["choices"][0]["delta"] == {"content": "hello"}
    assert events[-1]["error"].keys() == {"message", "type", "param", "code"}
    assert "secret" not in response.text
    assert "[DONE]" not in response.text


async def test_failures_of_a_whole_response(
    http: httpx.AsyncClient, client: FakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    client.script = lambda request: [Tokens(request.id, 0, [5]), EngineUnavailableError("the engine died")]
    check_body(await http.post(COMPLETIONS, json={"prompt": "a"}), 503)
    client.script = lambda request: [Tokens(request.id, 0, [5]), RuntimeError("secret detail")]
    with caplog.at_level(logging.ERROR):
        error = check_body(await http.post(COMPLETIONS, json={"prompt": "a"}), 500)
    assert "secret" not in error["message"]
    assert "secret detail" in caplog.text
    client.script = says([5])
    assert (await http.post(COMPLETIONS, json={"prompt": "a"})).status_code == 200


async def test_one_failing_prompt_ends_the_others(http: httpx.AsyncClient, client: FakeClient) -> None:
    def script(request: Any) -> Any:
        if request.id.endswith("-1"):
            return [GenerationError("broken")]
        return [*(Tokens(request.id, 0, [5]) for _ in range(1000)), Finished(request.id, 0, "length")]

    client.script = script
    check_body(await http.post(COMPLETIONS, json={"prompt": ["a", "b", "c"]}), 500)
    assert sorted(name[-1] for name in client.closed_early) == ["0", "2"]


async def test_body_limit(make_http: HttpFactory, client: FakeClient) -> None:
    http = make_http(max_body_bytes=1000)
    body = json.dumps({"prompt": "x" * 2000}).encode()
    check_body(await http.post(COMPLETIONS, content=body), 413)

    async def pieces() -> Any:
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    check_body(await http.post(COMPLETIONS, content=pieces()), 413)
    assert client.requests == []
    assert (await http.post(COMPLETIONS, json={"prompt": "x"})).status_code == 200


def test_every_kind_of_error_is_in_the_table() -> None:
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, QuireError)}
    assert kinds == set(ERROR_TABLE)
    statuses = {kind: row.status for kind, row in ERROR_TABLE.items()}
    assert statuses[AuthenticationError] == 401
    assert statuses[ModelNotFoundError] == 404
    assert statuses[RequestTooLargeError] == 413
    assert statuses[ConfigError] == statuses[ModelLoadError] == 500


async def test_errors_of_path_parameters(http: httpx.AsyncClient) -> None:
    """FastAPI's own validation wears the same body."""
    app: FastAPI = http._transport.app  # type: ignore[attr-defined]

    @app.get("/double/{number}")
    async def double(number: int) -> int:
        return 2 * number

    assert check_body(await http.get("/double/x"), 400)["param"] == "path.number"
