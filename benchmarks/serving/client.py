"""Streaming HTTP that costs the machine little: what arrives is kept with its time, and read when the load is over.

A token costs the client one read of the socket, one call of a C parser and one list entry.
"""

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

LIMIT_SECONDS = 600.0
"""After which an answer counts as failed."""


@dataclass(slots=True)
class Exchange:
    """A request and the raw answer; times on `time.perf_counter`."""

    started: float
    """When it was due: what it waits for a connection counts."""
    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    """Parts of the body, with the time of their arrival."""
    failure: str | None = None
    """Why there is no whole answer."""


@dataclass(frozen=True, slots=True)
class Server:
    """An OpenAI-compatible server."""

    url: str
    """Without `/v1`."""
    model: str = ""
    api_key: str | None = None

    async def connect(self) -> "Connection":
        """A new connection. Raises `OSError`."""
        parts = urlsplit(self.url)
        tls = parts.scheme == "https"
        port = parts.port or (443 if tls else 80)
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, parts.hostname or "", port, ssl=tls or None)
        return connection

    def request(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        """The bytes of a request: a POST if there is a body."""
        parts = urlsplit(self.url)
        data = b"" if body is None else json.dumps(body).encode()
        lines = [
            f"{'GET' if body is None else 'POST'} {parts.path.rstrip('/')}{path} HTTP/1.1",
            f"Host: {parts.netloc}",
            "Content-Type: application/json",
            f"Content-Length: {len(data)}",
            *([f"Authorization: Bearer {self.api_key}"] if self.api_key else []),
        ]
        return "\r\n".join([*lines, "", ""]).encode() + data

    async def fetch(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON of a whole answer. Raises `OSError` where there is none, with what the server said instead."""
        connection = await self.connect()
        exchange = await connection.ask(Exchange(time.perf_counter()), self.request(path, body))
        connection.close()
        said = b"".join(piece for _, piece in exchange.pieces)
        if exchange.failure or exchange.status != 200:
            raise OSError(
                exchange.failure or f"{path}: status {exchange.status}: {said[:300].decode(errors='replace')}"
            )
        return json.loads(said)


class Connection(asyncio.Protocol):
    """Kept alive; one exchange at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._now = 0.0
        self._exchange = Exchange(0.0)
        self._done: asyncio.Future[str | None] | None = None

    @property
    def usable(self) -> bool:
        """Whether another request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, exchange: Exchange, request: bytes) -> Exchange:
        """Send a request and wait for the end of its answer; what goes wrong stands in the exchange."""
        assert self._transport is not None
        self._exchange, self._parser = exchange, httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            async with asyncio.timeout(LIMIT_SECONDS):
                exchange.failure = await self._done
        except TimeoutError:
            exchange.failure = f"no whole answer after {LIMIT_SECONDS:.0f} s"
            self.close()
        return exchange

    def close(self) -> None:
        """Give the connection back."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asyncio's."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's says it is none

    def data_received(self, data: bytes) -> None:
        """Asyncio's."""
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"this is not HTTP: {error}")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Asyncio's."""
        self._end(f"the connection was lost: {exc}" if exc else "the server closed the connection")

    def on_body(self, body: bytes) -> None:
        """The parser's."""
        self._exchange.pieces.append((self._now, body))

    def on_message_complete(self) -> None:
        """The parser's."""
        self._exchange.status = self._parser.get_status_code()
        if not self._parser.should_keep_alive():
            self.close()
        self._end(None)

    def _end(self, failure: str | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(failure)
