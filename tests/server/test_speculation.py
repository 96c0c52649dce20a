"""Speculative decoding as users and operators see it: who drafts, for which requests, and what came of it."""

from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from typer.testing import CliRunner

from quire.core.errors import ConfigError, ConflictError, InvalidRequestError, QuireError
from quire.core.messages import EngineStats
from quire.core.speculation import DraftInfo, SpeculationCounts
from quire.server.cli import app
from quire.server.drafting import draft_settings
from quire.server.serving import ServeOptions, ready_line

from .fake_client import FakeClient, engine_info, says
from .test_ops import samples

BODY = {"prompt": "hello"}
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
DRAFT = DraftInfo(method="model", name="drafts/mini", most=3, num_bytes=2**20)
COUNTS = SpeculationCounts(
    drafts=10,
    draft_tokens=30,
    accepted_tokens=17,
    accepted_per_position=[9, 6, 2],
    lengths=[4, 0, 0, 10],
    draft_seconds=0.5,
    step_seconds=2.0,
    cached_tokens=48,
    computed_tokens=20,
)


@pytest.mark.parametrize(
    ("extra", "speculates"), [({}, True), ({"speculate": None}, True), ({"speculate": False}, False)]
)
async def test_a_request_may_opt_out(
    http: httpx.AsyncClient, client: FakeClient, extra: dict[str, Any], speculates: bool
) -> None:
    client.script = says([70])
    for route, body in (("/v1/completions", BODY), ("/v1/chat/completions", CHAT)):
        assert (await http.post(route, json=body | extra)).status_code == 200
    assert [request.speculate for request in client.requests] == [speculates] * 2


@pytest.mark.parametrize("value", ["false", 0, 1, {"draft": 3}])
@pytest.mark.parametrize(("route", "body"), [("/v1/completions", BODY), ("/v1/chat/completions", CHAT)])
async def test_no_truth_value_is_refused(
    http: httpx.AsyncClient, client: FakeClient, route: str, body: dict[str, Any], value: object
) -> None:
    answer = await http.post(route, json=body | {"speculate": value})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", "speculate")
    assert not client.requests


async def test_metrics_survive_a_restart_of_the_engine(http: httpx.AsyncClient, client: FakeClient) -> None:
    [listener] = client.listeners
    client.info = msgspec.structs.replace(engine_info(), draft=DRAFT)
    listener(EngineStats())
    begun = await samples(http)
    listener(EngineStats(steps_total=20, speculation=COUNTS))
    listener(EngineStats(steps_total=20, speculation=COUNTS))  # a heartbeat says nothing new
    again = msgspec.structs.replace(COUNTS, accepted_per_position=[1], lengths=[])
    listener(EngineStats(steps_total=2, speculation=again))
    found = await samples(http)
    names = {
        ("vllm:spec_decode_num_drafts_total", ()): 20.0,
        ("vllm:spec_decode_num_draft_tokens_total", ()): 60.0,
        ("vllm:spec_decode_num_accepted_tokens_total", ()): 34.0,
        ("vllm:spec_decode_num_accepted_tokens_per_pos_total", (("position", "0"),)): 10.0,
        ("vllm:spec_decode_num_accepted_tokens_per_pos_total", (("position", "2"),)): 2.0,
        ("quire:draft_lengths_total", (("length", "0"),)): 4.0,
        ("quire:draft_lengths_total", (("length", "3"),)): 10.0,
        ("quire:draft_seconds_total", ()): 1.0,
        ("quire:speculation_step_seconds_total", ()): 4.0,
        ("quire:draft_cached_tokens_total", ()): 96.0,
        ("quire:draft_computed_tokens_total", ()): 40.0,
    }
    assert {name: found[name] for name in names} == names
    assert {begun[name] for name in names} == {0.0}, (
        "a rate does not see the first event of a series that comes with it"
    )
    assert found["quire:drafter_bytes", ()] == 2**20
    labels = (("fixed", "false"), ("max_tokens", "3"), ("method", "model"), ("name", "drafts/mini"))
    assert found["quire:drafter_info", labels] == 1.0


async def test_without_a_drafter_there_is_nothing_to_see(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.listeners[0](EngineStats(steps_total=1))
    assert not [name for name, _ in await samples(http) if "spec_decode" in name or "draft" in name]
    assert (await http.get("/v1/models")).json()["data"][0]["draft"] is None
    assert ready_line("http://h:1", "tiny", engine_info()).endswith("| no speculation")


async def test_the_drafter_is_named(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.info = msgspec.structs.replace(engine_info(), draft=DRAFT)
    card = (await http.get("/v1/models/tiny")).json()["draft"]
    assert card == {"method": "model", "name": "drafts/mini", "max_tokens": 3, "fixed": False, "bytes": 2**20}
    assert ready_line("http://h:1", "tiny", client.info).endswith("| drafts by drafts/mini, up to 3 tokens")


async def test_another_draft_takes_the_place_of_the_first(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.info = msgspec.structs.replace(engine_info(), draft=DRAFT)
    [listener] = client.listeners
    listener(EngineStats())
    client.drafts["/drafts/new"] = msgspec.structs.replace(DRAFT, name="/drafts/new", num_bytes=7)
    answer = await http.post("/draft", json={"draft": "/drafts/new"})
    card = {"method": "model", "name": "/drafts/new", "max_tokens": 3, "fixed": False, "bytes": 7}
    assert (answer.status_code, answer.json()) == (200, card)
    assert (await http.get("/v1/models/tiny")).json()["draft"] == card
    listener(EngineStats())
    found = await samples(http)
    (labels,) = [dict(labels) for name, labels in found if name == "quire:drafter_info"]
    assert labels["name"] == "/drafts/new" and found["quire:drafter_bytes", ()] == 7


@pytest.mark.parametrize(
    ("error", "status"),
    [(InvalidRequestError("no", param="draft"), 400), (ConflictError("wait", param="draft"), 409)],
)
async def test_a_draft_that_is_refused(
    http: httpx.AsyncClient, client: FakeClient, error: QuireError, status: int
) -> None:
    client.info = msgspec.structs.replace(engine_info(), draft=DRAFT)
    client.drafts["/d"] = error
    answer = await http.post("/draft", json={"draft": "/d"})
    told = answer.json()["error"]
    assert (answer.status_code, told["type"], told["param"]) == (status, "invalid_request_error", "draft")
    assert (await http.get("/v1/models/tiny")).json()["draft"]["name"] == DRAFT.name


@pytest.mark.parametrize("body", [{}, {"draft": ""}, {"draft": 3}, {"draft": None}])
async def test_a_draft_must_be_named(http: httpx.AsyncClient, client: FakeClient, body: dict[str, Any]) -> None:
    answer = await http.post("/draft", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "draft")


def test_what_can_draft(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    for draft in ("auto", "none", "ngram", "layerskip:12", "owner/name-0.5B", str(tmp_path), f"ngram+{tmp_path}"):
        assert draft_settings(draft, "auto") == {"draft": draft, "draft_tokens": None}
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        draft_settings(str(tmp_path), "auto")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--draft", "ngrams"], "draft must be auto, ngram"),
        (["--draft", "/no/such/folder"], "got '/no/such/folder'"),
        (["--draft", "ngram+"], "got 'ngram+'"),
        (["--draft", "layerskip:0"], "got 'layerskip:0'"),
        (["--draft", "layerskip:two"], "got 'layerskip:two'"),
        (["--draft-tokens", "17"], "draft_tokens must be 1 to 16, got 17"),
        (["--draft-tokens", "some"], "must be auto or 1 to 16, got 'some'"),
    ],
)
@pytest.mark.parametrize("command", [["serve"], ["complete", "def"]])
def test_options_that_cannot_be_are_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, command: list[str], options: list[str], message: str
) -> None:
    monkeypatch.setattr("quire.server.serving.serve", pytest.fail)
    monkeypatch.setattr("quire.server.llm.load_in_process", pytest.fail)
    error = CliRunner().invoke(app, [*command, *options]).exception
    assert isinstance(error, ConfigError) and message in error.message and "\n" not in error.message


def test_the_environment_sets_the_drafter(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[ServeOptions] = []
    monkeypatch.setattr("quire.server.serving.serve", started.append)
    environment = {"QUIRE_DRAFT": "none", "QUIRE_DRAFT_TOKENS": "auto"}
    assert CliRunner().invoke(app, ["serve"], env=environment).exit_code == 0
    assert (started[0].engine.draft, started[0].engine.draft_tokens) == ("none", None)
