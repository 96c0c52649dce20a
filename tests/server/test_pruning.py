"""How a request says that it may be pruned, and what answers and metrics say of it."""

from collections.abc import Iterable
from typing import Any

import httpx
import msgspec
import pytest
from typer.testing import CliRunner

from quire.core.errors import ConfigError
from quire.core.messages import EngineStats, Finished, Tokens
from quire.core.pruning import CacheUse, PolicyInfo, PruneCounts, PruneParams
from quire.core.request import Request
from quire.server.cli import app
from quire.server.serving import ServeOptions
from quire.server.text import REPEAT_INSTRUCTION, Tokenizer

from .conftest import HttpFactory, events_of
from .fake_client import FakeClient, Step, says

BODY = {"prompt": "hello"}


async def test_all_fields_reach_the_engine(http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer) -> None:
    client.script = says([70])
    asked: dict[str, Any] = {
        "policy": "snapkv", "keep": 0.25, "floor": 32, "window": 16, "sinks": 2, "budget": "threshold",
        "threshold": 0.5, "refine": ["chunk"], "chunked": False, "every": 8, "when": "pressure",
    }  # fmt: skip
    assert (await http.post("/v1/completions", json=BODY | {"prune": asked})).status_code == 200
    stream = {"policy": "window", "positions": "cache"}
    chat = {"messages": [{"role": "user", "content": "hi"}], "prune": stream}
    assert (await http.post("/v1/chat/completions", json=chat)).status_code == 200
    first, second = client.requests
    assert first.prune == PruneParams(**asked | {"refine": ("chunk",)})
    assert second.prune == PruneParams(policy="window", positions="cache")
    assert tokenizer.decode(list(first.repeat_ids)) == REPEAT_INSTRUCTION


def chat(*texts: str, **prune: Any) -> dict[str, Any]:
    """A conversation, and how it is pruned."""
    return {"messages": [{"role": "user", "content": text} for text in texts], "prune": {"policy": "kvzip"} | prune}


async def test_the_context_of_a_chat_is_its_first_messages(
    http: httpx.AsyncClient, client: FakeClient, tokenizer: Tokenizer
) -> None:
    client.script = says([70])
    for texts, count in ((("a document", "why?"), 1), (("a document", "more of it", "how?"), 2)):
        answer = await http.post("/v1/chat/completions", json=chat(*texts, context_messages=count))
        assert answer.status_code == 200, answer.text
        (*_, request) = client.requests
        assert request.prune is not None
        text = tokenizer.decode(list(request.prompt_ids[: request.prune.context]), skip_special_tokens=False)
        assert text.rstrip().endswith(texts[count - 1]) and texts[count] not in text


@pytest.mark.parametrize("wrong", [{"context_messages": 0}, {"context_messages": 2}, {"context": 3}])
async def test_a_context_that_is_no_beginning_is_refused(
    http: httpx.AsyncClient, client: FakeClient, wrong: dict[str, Any]
) -> None:
    answer = await http.post("/v1/chat/completions", json=chat("a", "b", **{"context_messages": 1} | wrong))
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "prune.context_messages"
    answer = await http.post("/v1/completions", json=BODY | {"prune": {"policy": "kvzip", "context_messages": 1}})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "prune.context_messages"
    assert not client.requests


async def test_a_prompt_past_the_context_is_taken_where_positions_close_up(
    http: httpx.AsyncClient, client: FakeClient
) -> None:
    client.script = says([70])
    assert client.info is not None
    client.info = msgspec.structs.replace(client.info, max_stream_len=2 * client.info.max_model_len)
    for length, positions, status in (
        (1, "text", 400),
        (1, "cache", 200),
        (client.info.max_model_len + 1, "cache", 400),
    ):
        prompt, prune = [70] * (client.info.max_model_len + length - 1), {"policy": "window", "positions": positions}
        answer = await http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1, "prune": prune})
        assert answer.status_code == status, (length, positions)
    assert len(client.requests) == 1


@pytest.mark.parametrize("opts_out", [False, None])
async def test_the_default_is_for_requests_that_say_nothing(
    make_http: HttpFactory, client: FakeClient, opts_out: bool | None
) -> None:
    client.script = says([70])
    http = make_http(prune=PruneParams(policy="knorm", keep=0.7))
    for extra in ({}, {"prune": opts_out}, {"prune": {"policy": "window"}}):
        assert (await http.post("/v1/completions", json=BODY | extra)).status_code == 200
    policies = [request.prune and request.prune.policy for request in client.requests]
    assert policies == ["knorm", None, "window"]


@pytest.mark.parametrize(
    ("prune", "param"),
    [
        ({}, "prune.policy"),
        (True, "prune"),
        ({"policy": "window", "keeep": 0.5}, "prune.keeep"),
        ({"policy": "window", "keep": 0.0}, "prune.keep"),
        ({"policy": "window", "keep": 0.2}, "prune.keep"),
        ({"policy": "window", "window": 0}, "prune.window"),
        ({"policy": "window", "budget": "threshold"}, "prune.threshold"),
        ({"policy": "knorm", "budget": "threshold", "threshold": 1e9, "keep": 1.0}, "prune.budget"),
        ({"policy": "window", "positions": "cache", "keep": 0.01}, "prune.keep"),
        ({"policy": "quest", "keep": 0.2}, "prune.keep"),
    ],
)
async def test_what_cannot_be_asked_is_refused(
    make_http: HttpFactory, client: FakeClient, prune: object, param: str
) -> None:
    answer = await make_http(prune_min_keep=0.3).post("/v1/completions", json=BODY | {"prune": prune})
    assert answer.status_code == 400 and not client.requests
    assert answer.json()["error"]["param"] == param


async def test_usage_tells_what_is_kept(http: httpx.AsyncClient, client: FakeClient) -> None:
    def script(request: Request) -> Iterable[Step]:
        for index in range(2):
            yield Tokens(request.id, index, [70], cache=CacheUse(40.0, 0.0))
            yield Tokens(request.id, index, [71], cache=CacheUse(20.25, 20.75 + index))
            yield Finished(request.id, index, "stop")

    client.script = script
    body = BODY | {"n": 2, "prune": {"policy": "window"}}
    usage = (await http.post("/v1/completions", json=body)).json()["usage"]
    assert usage["kv_cache"] == {"policy": "window", "kept_entries": 40.5, "dropped_entries": 42.5}
    stream = body | {"stream": True, "stream_options": {"include_usage": True}}
    assert events_of((await http.post("/v1/completions", json=stream)).text)[-2]["usage"] == usage
    assert "kv_cache" not in (await http.post("/v1/completions", json=BODY | {"n": 2})).json()["usage"]


async def test_metrics_and_models_name_the_policies(http: httpx.AsyncClient, client: FakeClient) -> None:
    assert client.info is not None
    policies = {"window": PolicyInfo(), "expected": PolicyInfo(obstacle="no rotary embedding")}
    client.info = msgspec.structs.replace(client.info, policies=policies)
    counts = PruneCounts(entries=90, pages=6, seconds=0.5, prunes={"decode": 2})
    for listener in client.listeners:
        listener(EngineStats(steps_total=1, prunes={"window": counts}))
    text = (await http.get("/metrics")).text
    for line in (
        'quire:pruned_entries_total{model_name="tiny",policy="window"} 90.0',
        'quire:prune_pages_freed_total{model_name="tiny",policy="window"} 6.0',
        'quire:prune_seconds_total{model_name="tiny",policy="window"} 0.5',
        'quire:prunes_total{model_name="tiny",policy="window",reason="decode"} 2.0',
        'quire:prunes_total{model_name="tiny",policy="window",reason="pressure"} 0.0',
    ):
        assert line in text
    assert (await http.get("/v1/models")).json()["data"][0]["prune_policies"] == ["window"]


def test_the_command_line_sets_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[ServeOptions] = []
    monkeypatch.setattr("quire.server.serving.serve", started.append)
    options = ["serve", "--prune-policy", "knorm", "--prune-keep", "0.3", "--prune-min-keep", "0.2"]
    assert CliRunner().invoke(app, options).exit_code == 0
    assert CliRunner().invoke(app, [*options, "--pressure", "prune"]).exit_code == 0
    plain, pressed = started
    assert plain.http.prune == plain.engine.prune == PruneParams(policy="knorm", keep=0.3)
    assert plain.http.prune_min_keep == 0.2 and plain.engine.pressure == "preempt"
    assert pressed.engine.pressure == "prune"
    assert pressed.http.prune == PruneParams(policy="knorm", keep=0.3, when="pressure")


def test_a_default_below_the_least_share_is_no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.server.serving.serve", lambda _: pytest.fail("it starts"))
    options = ["serve", "--prune-policy", "knorm", "--prune-min-keep", "0.6"]
    for keep in ((), ("--prune-keep", "0.5")):
        with pytest.raises(ConfigError, match=r"keep 0.5 .* prune_min_keep is 0.6"):
            CliRunner().invoke(app, [*options, *keep], catch_exceptions=False)
