"""What `--distill-log` collects, and that it never gets in the way."""

import base64
import json
import logging
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from quire.core.errors import ConfigError
from quire.core.ids import RequestId
from quire.core.messages import Recorded, Tokens
from quire.core.pruning import PruneParams
from quire.core.request import Request
from quire.core.top_rows import pack_rows
from quire.server import traffic_log
from quire.server.cli import app
from quire.server.serving import ServeOptions
from quire.server.traffic_log import TrafficLog

from .conftest import HttpFactory
from .fake_client import FakeClient, Script, Step, says

REQUEST = Request(id=RequestId("r"), prompt_ids=(5, 6))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def row(token: int) -> bytes:
    """What a model says that holds `token` most likely."""
    return pack_rows(np.array([[token, 1]], np.int64), np.log([[0.5, 0.25]]).astype(np.float32))[0]


def recording(script: Script) -> Script:
    """The same, with rows before the tokens of requests that ask for them, and more of them at the end."""

    def play(request: Request) -> Iterator[Step]:
        for step in script(request):
            if request.record and isinstance(step, Tokens):
                yield Recorded(request.id, step.index, [row(token) for token in (*step.token_ids, 9)])
            yield step

    return play


async def test_every_choice_is_a_line(tmp_path: Path, make_http: HttpFactory, client: FakeClient) -> None:
    path = tmp_path / "traffic.jsonl"
    http = make_http(distill_log=path)
    client.script = says([20, 21, 22], [30, 31])
    body = {"model": "tiny", "prompt": [7, 8, 9], "n": 2, "max_tokens": 8}
    assert (await http.post("/v1/completions", json=body)).status_code == 200
    assert (await http.post("/v1/completions", json=body | {"stream": True})).status_code == 200
    assert lines(path) == 2 * [
        {"prompt_ids": [7, 8, 9], "output_ids": [20, 21, 22]},
        {"prompt_ids": [7, 8, 9], "output_ids": [30, 31]},
    ]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_model_said_is_a_part_of_the_line_alone(
    tmp_path: Path, make_http: HttpFactory, client: FakeClient, stream: bool
) -> None:
    client.script = recording(says([20, 21, 22], [30], per_event=3))
    fields = {"n": 2, "logprobs": 1, "stream": stream, "max_tokens": 8}
    answers = []
    for settings in ({}, {"distill_log": tmp_path / "log"}):
        response = await make_http(**settings).post("/v1/completions", json={"prompt": [7, 8]} | fields)
        assert response.status_code == 200
        answers.append(re.sub(r'"(id|created)":("[^"]*"|\d+)', "", response.text))
    assert answers[0] == answers[1] and '"top_logprobs"' in answers[1]
    assert [request.record for request in client.requests] == [False, True]
    for line, output in zip(lines(tmp_path / "log"), ([20, 21, 22], [30]), strict=True):
        assert line["output_ids"] == output and line["target"].pop("rows") == base64.b64encode(
            b"".join(map(row, output))
        ).decode("ascii")
        assert line["target"] == {"version": 1, "top": 2}


async def test_only_a_share_of_the_requests_and_none_that_may_be_pruned_is_recorded(
    tmp_path: Path, make_http: HttpFactory, client: FakeClient
) -> None:
    client.script = recording(says([20]))
    http = make_http(distill_log=tmp_path / "log", distill_log_share=0.5)
    for _ in range(60):
        assert (await http.post("/v1/completions", json={"prompt": [7]})).status_code == 200
    recorded = [request.record for request in client.requests]
    assert 10 < sum(recorded) < 50 and ["target" in line for line in lines(tmp_path / "log")] == recorded
    pruned = msgspec.structs.replace(REQUEST, prune=PruneParams(policy="h2o", keep=0.5, when="pressure"))
    log = TrafficLog(tmp_path / "other")
    assert log.entry(REQUEST).request.record and not log.entry(pruned).request.record
    with pytest.raises(ConfigError, match="distill_log_share"):
        make_http(distill_log_share=1.5)


def test_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[ServeOptions] = []
    monkeypatch.setattr("quire.server.serving.serve", asked.append)
    command = ["serve", "--distill-log", "f.jsonl", "--distill-log-share", "0.25"]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    assert (asked[0].http.distill_log, asked[0].http.distill_log_share) == (Path("f.jsonl"), 0.25)


async def test_nothing_is_kept_unless_asked_for(make_http: HttpFactory, client: FakeClient) -> None:
    application = make_http()._transport.app  # type: ignore[attr-defined]
    assert application.state.service.traffic_log is None


def test_what_was_said_before_an_end_is_kept(tmp_path: Path) -> None:
    log = TrafficLog(tmp_path / "log")
    entry = log.entry(REQUEST)
    entry.close()
    entry.take(Tokens(REQUEST.id, 0, [9]))
    entry.close()
    TrafficLog(tmp_path / "log").write("{}")  # a restarted server goes on in the same file
    assert lines(tmp_path / "log") == [{"prompt_ids": [5, 6], "output_ids": [9]}, {}]


def test_a_log_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write"):
        TrafficLog(tmp_path / "none" / "log")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_ends_the_log_alone(caplog: pytest.LogCaptureFixture) -> None:
    log = TrafficLog(Path("/dev/full"))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            log.write("{}")
    assert len(caplog.records) == 1 and "No space left" in caplog.text


def test_a_line_for_which_there_is_no_room_leaves_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log, path = TrafficLog(tmp_path / "log"), tmp_path / "log"
    log.write("{}")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        log.write("1" * 40)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.write("{}")
    assert path.read_text() == "{}\n" and "no room" in caplog.text


def test_a_log_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic_log, "MOST_BYTES", 10)
    log = TrafficLog(tmp_path / "log")
    for _ in range(9):
        log.write("1234")
    assert (tmp_path / "log").read_text() == "1234\n1234\n"
