"""Server-sent events, and noticing that a client went away."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..core.errors import QuireError
from .errors import error_body, unexpected
from .generation import Delta
from .metrics import Metrics
from .responses import ResponseFormat, Usage
from .schemas import StreamOptions

Result = TypeVar("Result")
DONE = b"data: [DONE]\n\n"
_ANY_TEXT = "\0"
"""Stands for the text where an event's frame is made; no model's name has it."""


def server_sent_event(body: dict[str, Any]) -> bytes:
    """One event of the stream."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work`, whose request body was read already; cancel it and raise `ClientDisconnect` if the client goes."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await _end(task)
        await _end(gone)


async def first_of(events: AsyncGenerator[Result, None]) -> Result:
    """The next item, as a coroutine that can be a task (what `anext` gives cannot)."""
    return await anext(events)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def event_stream(
    deltas: AsyncGenerator[list[Delta], None],
    style: ResponseFormat,
    usage: Usage,
    *,
    num_choices: int,
    options: StreamOptions,
    metrics: Metrics,
) -> AsyncGenerator[bytes, None]:
    """The response as events. What fails before the first one is raised, so that it becomes an HTTP status.

    Later failures become an error event that ends the stream, without `[DONE]`.
    """

    encoder = _EventEncoder(style, usage, options)
    opening = [encoder.event(body) for body in style.opening(num_choices)]
    begun = False
    try:
        async with aclosing(deltas):
            async for batch in deltas:
                events = [] if begun else opening
                for delta in batch:
                    usage.add(delta)
                    events += encoder.events(delta)
                if events or not begun:
                    begun = True
                    yield b"".join(events)
        yield (server_sent_event(style.usage_chunk(usage)) if options.include_usage else b"") + DONE
    except Exception as error:
        if not begun:
            raise
        failure = error if isinstance(error, QuireError) else unexpected(error)
        metrics.failed(failure)
        yield server_sent_event(error_body(failure))


class _EventEncoder:
    """Turns the deltas of a response into events. Those of a choice that bring text alone differ in nothing else: the
    rest of the event is encoded once."""

    def __init__(self, style: ResponseFormat, usage: Usage, options: StreamOptions) -> None:
        self._style = style
        self._usage = usage
        self._options = options
        self._frames: dict[int, tuple[bytes, bytes]] = {}
        """By choice: what stands before and behind the text."""

    def events(self, delta: Delta) -> list[bytes]:
        """Of a delta that the usage has already."""
        is_plain = delta.text and not (delta.tokens or delta.finish_reason or self._options.continuous_usage_stats)
        if not is_plain:
            return [self.event(body) for body in self._style.chunks(delta)]
        before, behind = self._frames.get(delta.index) or self._frame(delta.index)
        return [before + msgspec.json.encode(delta.text) + behind]

    def event(self, body: dict[str, Any]) -> bytes:
        """Of a chunk, with the usage if it was asked for."""
        if not self._options.include_usage:
            return server_sent_event(body)
        return server_sent_event(body | {"usage": self._usage.body() if self._options.continuous_usage_stats else None})

    def _frame(self, index: int) -> tuple[bytes, bytes]:
        (body,) = self._style.chunks(Delta(index, _ANY_TEXT))
        before, _, behind = self.event(body).partition(msgspec.json.encode(_ANY_TEXT))
        self._frames[index] = before, behind
        return before, behind


class EventStreamResponse(Response):
    """Sends a stream of events until it ends or the client goes; closes the stream in both cases.

    Unlike Starlette's `StreamingResponse` it notices a client that goes while no event is due, under every server,
    and never leaves the closing to the garbage collector.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None]) -> None:
        """`first`: the beginning of the body, already taken from `rest`."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        async with aclosing(self._rest):
            await until_disconnect(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if self._first:
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for events in self._rest:
            await send({"type": "http.response.body", "body": events, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
