"""A client that goes away closes its engine request, in every phase and response kind."""

import asyncio
import json
from collections.abc import Iterable, MutableMapping
from typing import Any

import pytest
from fastapi import FastAPI

from quire.core.messages import Tokens
from quire.core.request import Request
from quire.server.app import create_app
from quire.server.settings import ServerSettings
from quire.server.text import Tokenizer

from .fake_client import FakeClient, Step


class Browser:
    """One raw ASGI request whose connection can be cut."""

    def __init__(self, app: FastAPI, path: str, body: dict[str, Any]) -> None:
        self._body = json.dumps(body).encode()
        self._gone = asyncio.Event()
        self._sent_body = False
        self.received: list[MutableMapping[str, Any]] = []
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "client": ("test", 1),
            "server": ("test", 80),
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if not self._sent_body:
            self._sent_body = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        self.received.append(message)

    async def leave(self) -> None:
        """Cut the connection and wait for the server to be done with it."""
        self._gone.set()
        await asyncio.wait_for(self.task, 5)


@pytest.fixture
def app(client: FakeClient, tokenizer: Tokenizer) -> FastAPI:
    return create_app(client, tokenizer, ServerSettings(served_model_names=("tiny",)))


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


BODIES = [
    ("/v1/completions", {"prompt": "hello"}),
    ("/v1/completions", {"prompt": ["hello", "world"], "n": 2}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("tokens", [0, 2], ids=["waiting", "generating"])
@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_leaving_closes_the_request(
    app: FastAPI, client: FakeClient, path: str, body: dict[str, Any], tokens: int, stream: bool
) -> None:
    reached = asyncio.Event()

    def script(request: Request) -> Iterable[Step]:
        yield from (Tokens(request.id, 0, [50]) for _ in range(tokens))
        reached.set()
        yield asyncio.Event()

    client.script = script
    browser = Browser(app, path, {**body, "stream": stream})
    await until(reached.is_set)
    await browser.leave()
    assert sorted(client.closed_early) == sorted(request.id for request in client.requests)
    assert bool(browser.received) == (stream and tokens > 0)
    metrics = app.state.service.metrics.render().decode()
    state = "generating" if tokens else "waiting"
    assert f'quire:requests_aborted_total{{model_name="tiny",state="{state}"}} {len(client.requests)}.0' in metrics
    assert f'quire:http_requests_total{{route="{path}",status=' in metrics
    assert "quire:http_requests_open 0.0" in metrics


async def test_a_server_that_stops_closes_the_request(app: FastAPI, client: FakeClient) -> None:
    client.script = lambda request: [Tokens(request.id, 0, [50]), asyncio.Event()]
    browser = Browser(app, "/v1/completions", {"prompt": "hello", "stream": True})
    await until(lambda: len(browser.received) == 2)
    browser.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await browser.task
    assert client.closed_early == [client.requests[0].id]


async def test_events_are_sent_as_they_come(app: FastAPI, client: FakeClient) -> None:
    """The first token is on its way before the second one exists."""
    proceed = asyncio.Event()
    client.script = lambda request: [Tokens(request.id, 0, [50]), proceed, Tokens(request.id, 0, [51])]
    browser = Browser(app, "/v1/completions", {"prompt": "hello", "stream": True})
    await until(lambda: len(browser.received) == 2)
    assert browser.received[0]["status"] == 200
    assert browser.received[1]["body"].startswith(b"data: ")
    proceed.set()
    await until(lambda: not browser.received[-1].get("more_body", True))
    await browser.leave()
