"""`deploy/check_dashboard.py` against a scripted Prometheus."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "check_dashboard.py"


class _Prometheus(BaseHTTPRequestHandler):
    """Answers every query with `value`, or refuses those that contain `refuse`; remembers what was asked."""

    value = "1.5"
    refuse = ""
    rule_health = "ok"
    asked: list[str]

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path.endswith("/rules"):
            rule = {"name": "SomeAlert", "health": self.rule_health}
            self._answer(200, {"data": {"groups": [{"rules": [rule]}]}})
        elif url.path.endswith("/values"):
            self._answer(200, {"data": ["m"]})
        else:
            query = parse_qs(url.query)["query"][0]
            self.asked.append(query)
            if self.refuse and self.refuse in query:
                self._answer(400, {"status": "error", "error": "parse error: unexpected thing"})
            else:
                self._answer(200, {"data": {"result": [{"metric": {}, "value": [0, self.value]}]}})

    def _answer(self, status: int, body: object) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(_Prometheus, "asked", [], raising=False)
    server = HTTPServer(("127.0.0.1", 0), _Prometheus)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60)


def test_asks_everything_with_grafanas_variables_filled_in(url: str) -> None:
    result = _run(url, "--require-data", "--interval", "2m")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("0 refused, 0 without a value\n")
    assert len(_Prometheus.asked) >= 20
    assert any("[2m]" in query for query in _Prometheus.asked)
    assert not any("$" in query for query in _Prometheus.asked)


def test_not_a_number_is_no_value(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Prometheus, "value", "NaN")
    assert _run(url).returncode == 0
    result = _run(url, "--require-data")
    assert result.returncode == 1
    assert "= no value" in result.stdout


def test_refused_expression_is_named_with_its_panel(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Prometheus, "refuse", "num_preemptions")
    result = _run(url)
    assert result.returncode == 1
    assert "REFUSED  Preemptions: " in result.stdout and "unexpected thing" in result.stdout
    assert result.stdout.endswith("1 refused, 0 without a value\n")


def test_unhealthy_alert_rule_fails(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Prometheus, "rule_health", "err")
    result = _run(url)
    assert result.returncode == 1
    assert "SomeAlert: err" in result.stdout


def test_no_prometheus_is_one_clear_line() -> None:
    result = _run("http://127.0.0.1:9")
    assert result.returncode == 1
    assert result.stderr.startswith("error: http://127.0.0.1:9 does not answer") and result.stderr.count("\n") == 1
