"""The server's side of the engine: `EngineClient`, and `ProcessClient` which runs and supervises an engine process.

When the engine dies, or its heart stops, every open request fails with `EngineUnavailableError` and the engine is
started again with a growing pause. It is given up when it cannot start, or dies `MAX_DEATHS` times without having
served for `STABLE_SECONDS`; then `failed` carries the reason, and the server's exit code is not 0.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from typing import Literal, Protocol

import msgspec

from ..core.config import EngineConfig
from ..core.errors import ConfigError, ConflictError, EngineUnavailableError, QuireError, describe, revive
from ..core.ids import RequestId
from ..core.messages import (
    Abort,
    DraftRefused,
    DraftReplaced,
    EngineInfo,
    EngineMessage,
    EngineStats,
    Event,
    Failed,
    Finished,
    Progress,
    Ready,
    ReplaceDraft,
    Shutdown,
    StartFailed,
    StepReport,
    Submit,
    single_events,
)
from ..core.request import Request
from ..core.speculation import DraftInfo
from .engine_process import EngineProcess
from .loop import EngineLoop
from .process import load_loop

HEART_STOPPED_SECONDS = 240.0
"""Without a sign of life for this long the engine counts as hung and is restarted; /health complains earlier. A step
of a large model on a slow CPU may take a minute."""
SNAPSHOT_SECONDS = 600.0
"""The longest time an engine may take to write its computed prefixes before it ends."""
SHUTDOWN_SECONDS = 5.0
"""The same where there is nothing to write."""
_LAST_WORDS_SECONDS = 5.0
"""How long to wait for why an engine ended that never was ready, on a machine that is busy with other things."""
MAX_DEATHS = 5
"""In a row: an engine that was ready for `STABLE_SECONDS` begins a new one."""
STABLE_SECONDS = 60.0
MAX_BACKOFF_SECONDS = 30.0
log = logging.getLogger("quire.client")

Status = Literal["starting", "ready", "restarting", "stopped"]


class EngineClient(Protocol):
    """What the HTTP layer needs of an engine, wherever it runs."""

    @property
    def status(self) -> Status:
        """Whether requests are taken."""
        ...

    @property
    def info(self) -> EngineInfo | None:
        """Model and pool facts; None until first ready."""
        ...

    @property
    def stats(self) -> EngineStats:
        """The newest report."""
        ...

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the engine's last sign of life."""
        ...

    @property
    def restarts(self) -> int:
        """How often the engine was started again."""
        ...

    def add_stats_listener(self, callback: Callable[[EngineStats], None]) -> None:
        """Call `callback` with each report's stats."""
        ...

    def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        """Events of all `n` choices until each is finished. Raises `QuireError` on refusal and when the engine dies.

        Closing the generator early aborts the request.
        """
        ...

    async def replace_draft(self, folder: str) -> DraftInfo:
        """Draft with the model in a folder on the server from now on; what there is to know of it.

        Raises `QuireError` where it cannot be used, then the old one goes on: `ConflictError` while another is on its
        way.
        """
        ...


class ProcessClient:
    """Runs the engine in a process of its own."""

    def __init__(self, config: EngineConfig, on_progress: Callable[[Progress], None] | None = None) -> None:
        self.status: Status = "starting"
        self.info: EngineInfo | None = None
        self.stats = EngineStats()
        self.restarts = 0
        self.ready = asyncio.Event()
        self.failed: asyncio.Future[QuireError] = asyncio.get_running_loop().create_future()
        """Set when the engine is given up, with the reason."""
        self._config = config
        self._on_progress = on_progress
        self._listeners: list[Callable[[EngineStats], None]] = []
        self._streams: dict[RequestId, asyncio.Queue[Event]] = {}
        self._swap: asyncio.Future[DraftInfo | QuireError] | None = None
        """What will come of the draft that is on its way; None: none is."""
        self._last_sign = self._ready_since = time.monotonic()
        self._engine = EngineProcess(config)
        self._supervisor = asyncio.create_task(self._supervise())

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the engine's last sign of life."""
        return time.monotonic() - self._last_sign

    def add_stats_listener(self, callback: Callable[[EngineStats], None]) -> None:
        """Call `callback` with each report's stats."""
        self._listeners.append(callback)

    async def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        """See `EngineClient.generate`."""
        if self.status != "ready":
            raise EngineUnavailableError(f"the engine is {self.status}", retry_after=2.0)
        events: asyncio.Queue[Event] = asyncio.Queue()
        self._streams[request.id] = events
        open_choices = request.params.n
        try:
            self._engine.send(Submit(request))
            while open_choices:
                event = await events.get()
                if isinstance(event, Failed):
                    open_choices = 0
                    raise revive(event.error)
                if isinstance(event, Finished):
                    open_choices -= 1
                yield event
        finally:
            del self._streams[request.id]
            if open_choices and self.status == "ready":
                self._engine.send(Abort(request.id))

    async def replace_draft(self, folder: str) -> DraftInfo:
        """See `EngineClient.replace_draft`. An engine that is started again begins with that draft."""
        if self.status != "ready":
            raise EngineUnavailableError(f"the engine is {self.status}", retry_after=2.0)
        if self._swap is not None:
            raise ConflictError("another draft is on its way", param="draft")
        self._swap = asyncio.get_running_loop().create_future()
        self._engine.send(ReplaceDraft(folder))
        # Who asks may go away meanwhile; the draft comes all the same.
        result = await asyncio.shield(self._swap)
        if isinstance(result, QuireError):
            raise result
        return result

    async def shutdown(self) -> None:
        """Stop the engine; open requests fail."""
        self.status = "stopped"
        self._supervisor.cancel()
        await asyncio.gather(self._supervisor, return_exceptions=True)
        self._fail_all(EngineUnavailableError("the server is shutting down"))
        if self._engine.exit_code is None:
            self._engine.send(Shutdown())
            await self._engine.wait(SNAPSHOT_SECONDS if self._config.cache_file else SHUTDOWN_SECONDS)
        self._engine.close()

    async def _supervise(self) -> None:
        """Run engines, one after another, until one cannot be started or too many died."""
        deaths = 0
        unstarted: QuireError | None = None
        while True:
            reason = unstarted or await self._run_engine()
            served = self.ready.is_set() and time.monotonic() - self._ready_since > STABLE_SECONDS
            self.ready.clear()
            self._tell(EngineStats())  # what it held is gone: nobody runs or waits, no page is used
            deaths = 1 if served else deaths + 1
            self._engine.close()
            if self.info is None or deaths >= MAX_DEATHS:
                self.status = "stopped"
                if deaths > 1:
                    reason = EngineUnavailableError(f"{reason.message}, {deaths} times in a row: not started again")
                self._fail_all(reason)
                self.failed.set_result(reason)
                return
            self.status = "restarting"
            log.error("%s; restarting it", reason.message)
            self._fail_all(EngineUnavailableError(f"{reason.message}; it is being restarted", retry_after=5.0))
            await asyncio.sleep(min(MAX_BACKOFF_SECONDS, 0.5 * 2 ** (deaths - 1)))
            unstarted = self._restart()

    def _restart(self) -> QuireError | None:
        """Start another engine in place of a dead one; returns what keeps it from starting, if anything does."""
        self.restarts += 1
        self._last_sign = time.monotonic()
        try:
            self._engine = EngineProcess(self._config)
        except ConfigError as error:
            return error
        return None

    async def _run_engine(self) -> QuireError:
        """Pass on the present engine's messages until it dies; returns why it did."""
        receiving = asyncio.create_task(self._receive())
        try:
            while True:
                done, _ = await asyncio.wait({receiving}, timeout=0.2)
                if done:
                    return receiving.result()
                if self._engine.exit_code is not None:
                    # Its last words may still be in the socket: StartFailed says more than an exit code.
                    patience = 0.5 if self.ready.is_set() else _LAST_WORDS_SECONDS
                    done, _ = await asyncio.wait({receiving}, timeout=patience)
                    return receiving.result() if done else self._death()
                if self.heartbeat_age > HEART_STOPPED_SECONDS and self.status == "ready":
                    return EngineUnavailableError(f"the engine gave no sign of life for {self.heartbeat_age:.0f} s")
        finally:
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)

    def _death(self) -> QuireError:
        return EngineUnavailableError(f"the engine process died (exit code {self._engine.exit_code})")

    async def _receive(self) -> QuireError:
        """Handle messages; returns only when the engine says that it cannot start."""
        while True:
            message = await self._engine.receive()
            self._last_sign = time.monotonic()
            if isinstance(message, StartFailed):
                return revive(message.error)
            self._handle(message)

    def _handle(self, message: EngineMessage) -> None:
        if isinstance(message, StepReport):
            for event in single_events(message.events):
                stream = self._streams.get(event.request_id)
                if stream is not None:  # else the request was closed meanwhile; its abort is on the way
                    stream.put_nowait(event)
            self._tell(message.stats)
        elif isinstance(message, Ready):
            if self.restarts:
                log.info("the engine is ready again")
            self.info = message.info
            self._ready_since = time.monotonic()
            self.status = "ready"
            self.ready.set()
        elif isinstance(message, DraftReplaced):
            assert self.info is not None
            self.info = msgspec.structs.replace(self.info, draft=message.draft)
            self._config = msgspec.structs.replace(self._config, draft=message.draft.name)
            self._end_swap(message.draft)
        elif isinstance(message, DraftRefused):
            self._end_swap(revive(message.error))
        elif isinstance(message, Progress) and self._on_progress:
            self._on_progress(message)

    def _tell(self, stats: EngineStats) -> None:
        self.stats = stats
        for listener in self._listeners:
            listener(stats)

    def _end_swap(self, result: DraftInfo | QuireError) -> None:
        if self._swap is not None:
            self._swap.set_result(result)
            self._swap = None

    def _fail_all(self, error: QuireError) -> None:
        self._end_swap(error)
        for request_id, stream in self._streams.items():
            stream.put_nowait(Failed(request_id, describe(error)))


def load_in_process(config: EngineConfig) -> EngineLoop:
    """The same scheduler and engine in this process, for the offline API and tests."""
    return load_loop(config, lambda phase, done, total: None)
