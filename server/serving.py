"""`quire serve` at work: the socket, the engine process, the HTTP server, and an orderly end of all three."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, cast

import uvicorn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from ..core.config import EngineConfig
from ..core.errors import ConfigError
from ..core.messages import EngineInfo, Progress
from ..core.speculation import DraftInfo
from ..scheduler.client import ProcessClient
from .app import create_app
from .settings import ServerSettings, Service
from .text import Tokenizer

DRAIN_SECONDS = 300
"""How long open requests may go on after the first SIGTERM or Ctrl-C; a second one ends them at once."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What `quire serve` was asked for, beside the engine's settings."""

    engine: EngineConfig
    http: ServerSettings
    host: str
    port: int


class _HttpServer(uvicorn.Server):
    """Uvicorn without its own signal handling, which would end the process before the engine is stopped."""

    _draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self, service: Service) -> None:
        """First call: not ready any more, no new work, open requests end. Second call: all ends now."""
        if service.draining:
            self.force_exit = self.should_exit = True
            return
        service.draining = True
        self._draining = asyncio.create_task(self._drain(service))

    async def _drain(self, service: Service) -> None:
        """Probes are answered until the last open request has ended."""
        deadline = asyncio.get_running_loop().time() + DRAIN_SECONDS
        while service.open_requests and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        self.should_exit = True


class _StartDisplay:
    """Start-up progress as bars on a terminal; silent elsewhere (the ready line says it all)."""

    def __init__(self) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def show(self, progress: Progress) -> None:
        """Draw one step of progress."""
        if not self._bars.console.is_terminal:
            return
        if not self._tasks:
            self._bars.start()
        if progress.phase not in self._tasks:
            self._tasks[progress.phase] = self._bars.add_task(progress.phase)
        self._bars.update(self._tasks[progress.phase], completed=progress.done, total=progress.total)

    def close(self) -> None:
        """Leave the terminal clean; where nothing was shown, `stop` would print an empty line."""
        if self._tasks:
            self._bars.stop()


def serve(options: ServeOptions) -> None:
    """Serve until told to stop. Raises `QuireError` when it cannot start or the engine is gone for good."""
    listener = _listen(options.host, options.port)
    with listener:
        loop_factory = uvicorn.Config("", loop="auto").get_loop_factory()
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(_serve(options, listener))


def _listen(host: str, port: int) -> socket.socket:
    """Take the port before anything slow starts, so that a taken one is reported at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}") from error
    return listener


async def _serve(options: ServeOptions, listener: socket.socket) -> None:
    display = _StartDisplay()
    client = ProcessClient(options.engine, display.show)
    try:
        engine = options.engine
        tokenizer = await asyncio.to_thread(Tokenizer.load, engine.model, engine.trust_remote_code)
        app = create_app(client, tokenizer, options.http)
        server = _HttpServer(
            uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=5)
        )
        for name in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(name, server.stop, app.state.service)
        announcing = asyncio.create_task(_announce(client, display, listener, options))
        await _until_done(server, client, listener)
        announcing.cancel()
    finally:
        display.close()
        await client.shutdown()


async def _until_done(server: _HttpServer, client: ProcessClient, listener: socket.socket) -> None:
    """Run the HTTP server until it is told to stop; raise the reason when the engine is given up."""
    serving: asyncio.Future[None] = asyncio.ensure_future(server.serve(sockets=[listener]))
    await asyncio.wait(cast("set[asyncio.Future[Any]]", {serving, client.failed}), return_when=asyncio.FIRST_COMPLETED)
    if client.failed.done():
        server.should_exit = True
        await asyncio.wait({serving}, timeout=5)
        raise client.failed.result()
    await serving


async def _announce(
    client: ProcessClient, display: _StartDisplay, listener: socket.socket, options: ServeOptions
) -> None:
    await client.ready.wait()
    display.close()
    assert client.info is not None
    host = f"[{options.host}]" if ":" in options.host else options.host
    url = f"http://{host}:{listener.getsockname()[1]}"
    print(ready_line(url, options.http.served_model_names[0], client.info), flush=True)


def ready_line(url: str, name: str, info: EngineInfo) -> str:
    """The one line that says what is served, where, and how much fits."""
    return (
        f"Quire {version('quire')} ready: {url} | model {name} | {info.device}, {info.dtype} | "
        f"{info.num_pages:,} KV pages ({info.kv_bytes / 2**20:,.0f} MiB) hold "
        f"{info.max_concurrency:,.1f} requests of {info.max_model_len:,} tokens | {_drafts(info.draft)}"
    )


def _drafts(draft: DraftInfo | None) -> str:
    """Who drafts how many tokens, for people."""
    if draft is None:
        return "no speculation"
    return f"drafts by {draft.name}, {'always' if draft.fixed else 'up to'} {draft.most} tokens"


def served_name(model: str) -> str:
    """The name under which a model folder or hub name is served unless the operator says otherwise."""
    return os.path.basename(os.path.normpath(model)) if os.path.isdir(model) else model
