"""Health, readiness, models, tokenizing, the API key, metrics."""

import asyncio
from typing import Any

import httpx
import pytest
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from quire.core.errors import OverloadedError
from quire.core.messages import EngineStats
from quire.core.speculation import DraftInfo
from quire.server.keys import parse_keys
from quire.server.metrics import Metrics, SequenceTimer
from quire.server.text import Tokenizer

from .conftest import BOS, HttpFactory
from .fake_client import FakeClient, says

ROUTES = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/draft"),
    ("GET", "/version"),
    ("GET", "/metrics"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/nowhere"),
    ("GET", "/health/"),
]


async def samples(http: httpx.AsyncClient) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """All values of /metrics by name and labels, the model's name left out."""
    response = await http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return {
        (s.name, tuple(sorted((k, v) for k, v in s.labels.items() if k != "model_name"))): s.value
        for family in text_string_to_metric_families(response.text)
        for s in family.samples
    }


async def test_health_and_ready(http: httpx.AsyncClient, client: FakeClient) -> None:
    assert (await http.get("/health")).json() == {"status": "ok"}
    assert (await http.get("/ready")).status_code == 200
    for path in ("/health", "/ready"):
        assert (await http.head(path)).status_code == 200
    for state in ("starting", "restarting", "stopped"):
        client.status = state
        for path in ("/health", "/ready"):
            response = await http.get(path)
            assert response.status_code == 503
            assert state in response.text
    client.status = "ready"
    client.heartbeat_age = 1000.0
    response = await http.get("/health")
    assert response.status_code == 503
    assert "no sign of life" in response.json()["reason"]


async def test_a_draining_server_is_not_ready(http: httpx.AsyncClient) -> None:
    http._transport.app.state.service.draining = True  # type: ignore[attr-defined]
    response = await http.get("/ready")
    assert (response.status_code, response.json()) == (503, {"status": "draining"})
    assert (await http.get("/health")).status_code == 200
    refused = await http.post("/v1/completions", json={"prompt": "new work"})
    assert refused.status_code == 503 and int(refused.headers["Retry-After"]) > 0


async def test_models(http: httpx.AsyncClient, client: FakeClient) -> None:
    body = (await http.get("/v1/models")).json()
    assert (body["object"], [card["id"] for card in body["data"]]) == ("list", ["tiny", "org/tiny"])
    assert body["data"][0].keys() >= {"id", "object", "created", "owned_by", "max_model_len"}
    assert (await http.get("/v1/models/org/tiny")).json() == body["data"][1]
    client.info = None
    assert (await http.get("/v1/models")).json()["data"][0]["max_model_len"] is None


async def test_version_and_api_page(http: httpx.AsyncClient) -> None:
    assert (await http.get("/version")).json()["version"]
    page = (await http.get("/openapi.json")).json()
    schema = page["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"]["messages"]["items"]["properties"]["role"]["enum"]
    assert "$ref" not in str(schema)


async def test_tokenize_and_back(http: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello 😀")
    body = (await http.post("/tokenize", json={"model": "tiny", "prompt": "hello 😀"})).json()
    assert body == {"count": len(ids), "max_model_len": 256, "tokens": ids, "token_strs": None}
    fields = {"prompt": "hello", "add_special_tokens": False, "return_token_strs": True}
    body = (await http.post("/tokenize", json=fields)).json()
    assert "".join(body["token_strs"]) == "hello"
    assert (await http.post("/detokenize", json={"tokens": ids})).json() == {"prompt": "<|bos|>hello 😀"}
    messages = [{"role": "user", "content": "hi"}]
    body = (await http.post("/tokenize", json={"messages": messages})).json()
    assert body["tokens"].count(BOS) == 1
    assert tokenizer.decode(body["tokens"], False) == "<|bos|>user: hi\nassistant:"


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "hi"}]}),
        ("/tokenize", {"prompt": 5}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": ["a"]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [100_000]}),
    ],
)
async def test_bad_tokenizing(http: httpx.AsyncClient, url: str, body: dict[str, Any]) -> None:
    response = await http.post(url, json=body)
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_the_key_guards_every_route(make_http: HttpFactory, method: str, path: str) -> None:
    http = make_http(api_keys=parse_keys(["other", "team=schlüssel"]))
    for header in (None, "Bearer wrong", "schlüssel", "Basic schlüssel", "Bearer", "Bearer schlüssel2"):
        headers = {} if header is None else {b"Authorization": header.encode()}
        response = await http.request(method, path, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    response = await http.request(method, path, headers={b"Authorization": "Bearer schlüssel".encode()})
    assert response.status_code != 401


@pytest.mark.parametrize(
    ("keys", "admin", "offered", "completes", "drafts"),
    [
        ([], [], "", 200, 200),
        (["user"], [], "user", 200, 200),
        (["user"], ["boss"], "", 401, 401),
        (["user"], ["boss"], "wrong", 401, 401),
        (["user"], ["boss"], "user", 200, 403),
        (["user"], ["boss"], "boss", 200, 200),
        ([], ["boss"], "", 200, 401),
        ([], ["boss"], "wrong", 200, 401),
        ([], ["boss"], "boss", 200, 200),
    ],
)
async def test_an_admin_key_keeps_admin_routes(
    make_http: HttpFactory,
    client: FakeClient,
    keys: list[str],
    admin: list[str],
    offered: str,
    completes: int,
    drafts: int,
) -> None:
    client.drafts["ngram"] = DraftInfo(method="ngram", name="ngram", most=8)
    http = make_http(api_keys=parse_keys(keys, admin))
    headers = {"Authorization": f"Bearer {offered}"} if offered else {}
    completion = await http.post("/v1/completions", json={"prompt": "hello"}, headers=headers)
    replacement = await http.post("/draft", json={"draft": "ngram"}, headers=headers)
    assert (completion.status_code, replacement.status_code) == (completes, drafts)
    if drafts == 403:
        assert replacement.json()["error"]["type"] == "permission_error"


async def test_pages_of_other_origins(make_http: HttpFactory) -> None:
    page = {"Origin": "https://chat.example"}
    asking = page | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    allowed = "access-control-allow-origin"
    http = make_http(cors_origins=("https://chat.example",), api_keys=parse_keys(["secret"]))
    preflight = await http.options("/v1/chat/completions", headers=asking)
    assert (preflight.status_code, preflight.headers[allowed]) == (200, "https://chat.example")
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    refused = await http.get("/v1/models", headers=page)  # the page sees why
    assert (refused.status_code, refused.headers[allowed]) == (401, "https://chat.example")
    for closed, origin in ((http, "https://other.example"), (make_http(), "https://chat.example")):
        response = await closed.options("/v1/models", headers=asking | {"Origin": origin})
        assert response.status_code >= 400 and allowed not in response.headers


async def test_probes_need_no_key(make_http: HttpFactory) -> None:
    http = make_http(api_keys=parse_keys(["secret"]))
    assert (await http.get("/health")).status_code == 200
    assert (await http.get("/ready")).status_code == 200


async def test_request_metrics(http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer) -> None:
    output = tokenizer.encode("hello world", False)
    client.script = says(output)
    await http.post("/v1/completions", json={"prompt": "hello"})
    await http.post("/v1/completions", json={"prompt": "hello", "stream": True, "stop": "world"})
    client.script = lambda request: [OverloadedError("full")]
    await http.post("/v1/completions", json={"prompt": "hello"})
    await http.get("/nowhere/secret")
    found = await samples(http)
    assert found["vllm:request_success_total", (("finished_reason", "stop"),)] == 2
    assert found["vllm:time_to_first_token_seconds_count", ()] == 2
    assert found["vllm:e2e_request_latency_seconds_count", ()] == 2
    assert found["vllm:request_time_per_output_token_seconds_count", ()] == 2
    assert found["vllm:inter_token_latency_seconds_count", ()] >= len(output) - 1
    assert found["vllm:request_prompt_tokens_sum", ()] == 2 * len(tokenizer.encode("hello"))
    assert found["vllm:request_generation_tokens_count", ()] == 2
    assert found["vllm:request_queue_time_seconds_sum", ()] == 0.25
    assert found["quire:requests_failed_total", (("kind", "OverloadedError"),)] == 1
    assert found["quire:http_requests_total", (("route", "/v1/completions"), ("status", "200"))] == 2
    assert found["quire:http_requests_total", (("route", "/v1/completions"), ("status", "429"))] == 1
    assert found["quire:http_requests_total", (("route", "unmatched"), ("status", "404"))] == 1
    assert found["quire:http_requests_open", ()] == 1


async def test_engine_metrics(make_http: HttpFactory, client: FakeClient) -> None:
    http = make_http(metrics_prefix="quire:")
    [listener] = client.listeners
    first = EngineStats(running=3, waiting=2, pages_used=25, pages_total=100, steps_total=1, prompt_tokens_total=40)
    first = replace(first, prefix_queries_total=60, prefix_hits_total=20, pages_cached=9)
    listener(first)
    listener(first)  # a heartbeat says nothing new
    listener(EngineStats(steps_total=2, prompt_tokens_total=50, generation_tokens_total=4, batch_tokens=7))
    restarted = EngineStats(steps_total=1, prompt_tokens_total=5, preemptions_total=1, pages_total=100, pages_used=25)
    listener(replace(restarted, prefix_queries_total=5, prefix_hits_total=1, pages_cached=8))
    client.restarts = 1
    found = await samples(http)
    assert found["quire:num_requests_running", ()] == 0
    assert found["quire:kv_cache_usage_perc", ()] == 0.25
    assert found["quire:prompt_tokens_total", ()] == 55
    assert found["quire:generation_tokens_total", ()] == 4
    assert found["quire:num_preemptions_total", ()] == 1
    assert found["quire:prefix_cache_queries_total", ()] == 65
    assert found["quire:prefix_cache_hits_total", ()] == 21
    assert found["quire:kv_pages_cached", ()] == 8
    assert found["quire:engine_steps_total", ()] == 3
    assert found["quire:iteration_tokens_total_sum", ()] == 7
    assert found["quire:kv_pages_total", ()] == 100
    assert found["quire:engine_restarts", ()] == 1
    assert found["quire:engine_up", ()] == 1
    client.status = "restarting"
    found = await samples(http)
    assert found["quire:engine_up", ()] == 0
    assert found["quire:engine_state", (("state", "restarting"),)] == 1


def test_times_of_a_sequence(client: FakeClient) -> None:
    metrics = Metrics(client, "tiny", "vllm:")
    now = iter([12.0, 12.5, 13.5, 14.0])
    timer = SequenceTimer(metrics, arrived=10.0, clock=lambda: next(now))
    for count in (1, 2, 2):
        timer.on_tokens(count)
    timer.on_end("length", prompt_tokens=7, output_tokens=5, queue_seconds=None)
    value = metrics.registry.get_sample_value
    labels = {"model_name": "tiny"}
    assert value("vllm:time_to_first_token_seconds_sum", labels) == 2.0
    assert value("vllm:inter_token_latency_seconds_sum", labels) == 1.5
    assert value("vllm:inter_token_latency_seconds_count", labels) == 2
    assert value("vllm:request_time_per_output_token_seconds_sum", labels) == 1.5 / 4
    assert value("vllm:e2e_request_latency_seconds_sum", labels) == 4.0
    assert value("vllm:request_queue_time_seconds_count", labels) == 0


async def test_many_requests_at_once(http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer) -> None:
    client.script = lambda request: says(tokenizer.encode(f" {request.params.seed}", False))(request)
    bodies = [{"prompt": "hello", "seed": seed, "stream": False} for seed in range(50)]
    answers = await asyncio.gather(*(http.post("/v1/completions", json=body) for body in bodies))
    assert [answer.json()["choices"][0]["text"] for answer in answers] == [f" {seed}" for seed in range(50)]
