"""The image's health check against a small server."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "healthcheck.py"


class _Health(BaseHTTPRequestHandler):
    answer = 200

    def do_GET(self) -> None:
        self.send_response(self.answer if self.path == "/health" else 404)
        self.end_headers()
        self.wfile.write(b'{"status": "as the test says"}')

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), _Health)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def _run(port: int) -> subprocess.CompletedProcess[str]:
    # A proxy that does not exist: the check must not ask it.
    environment = {"QUIRE_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
    return subprocess.run(
        [sys.executable, "-I", str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=30
    )


def test_healthy(server: HTTPServer) -> None:
    assert _run(server.server_port).returncode == 0


def test_unhealthy_tells_why(server: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Health, "answer", 503)
    result = _run(server.server_port)
    assert result.returncode == 1
    assert "503" in result.stderr and "as the test says" in result.stderr


def test_no_server(server: HTTPServer) -> None:
    port = server.server_port
    server.shutdown()
    server.server_close()
    result = _run(port)
    assert result.returncode == 1
    assert "no answer" in result.stderr
