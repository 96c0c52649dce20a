"""What `--distill-log` collects, and that it never gets in the way."""

import json
import logging
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quire.core.errors import ConfigError
from quire.core.ids import RequestId
from quire.core.messages import Tokens
from quire.core.request import Request
from quire.server import traffic_log
from quire.server.cli import app
from quire.server.serving import ServeOptions
from quire.server.traffic_log import TrafficLog

from .conftest import HttpFactory
from .fake_client import FakeClient, says

REQUEST = Request(id=RequestId("r"), prompt_ids=(5, 6))


def lines(path: Path) -> list[dict[str, list[int]]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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


def test_the_option_names_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[ServeOptions] = []
    monkeypatch.setattr("quire.server.serving.serve", asked.append)
    assert CliRunner().invoke(app, ["serve", "--distill-log", "f.jsonl"], catch_exceptions=False).exit_code == 0
    assert asked[0].http.distill_log == Path("f.jsonl")


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


def test_a_log_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic_log, "MOST_BYTES", 10)
    log = TrafficLog(tmp_path / "log")
    for _ in range(9):
        log.write("1234")
    assert (tmp_path / "log").read_text() == "1234\n1234\n"
