"""The engine process: `python -m quire.scheduler.process DESCRIPTOR`, an `EngineConfig` as JSON on standard input.

The descriptor is of its end of a socket pair. The main thread owns scheduler and device, and never waits for it.
The process ends by itself when its parent is gone: an engine without a server only holds memory.

Exit codes: 0 after `Shutdown`, 1 when it cannot start or a step fails, 3 when the parent is gone.
"""

import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from ..core.config import LOG_FORMAT, EngineConfig
from ..core.errors import ConfigError, ModelLoadError, QuireError, describe
from ..core.messages import (
    Abort,
    ClientMessage,
    EngineMessage,
    Progress,
    Ready,
    ReplaceDraft,
    Shutdown,
    StartFailed,
    Submit,
)
from .admission import check_default_pruning
from .draft_swap import FetchedDraft, fetch_draft, replace_draft
from .framing import Unframer, framed
from .grammar_gate import CompiledGrammar, GrammarGate
from .loop import EngineLoop, scheduler_config
from .snapshot import load_cache, save_cache

HEARTBEAT_SECONDS = 1.0
EXIT_PARENT_GONE = 3
log = logging.getLogger("quire.engine")


def load_loop(config: EngineConfig, on_progress: Callable[[str, int, int], None]) -> EngineLoop:
    """Load the model and the pool and put a scheduler over them. Raises `QuireError` if that cannot work."""
    from ..engine.engine import Engine  # torch comes with it: only the process that computes pays for that
    from .scheduler import Scheduler

    try:
        engine = Engine.load(config, on_progress)
    except OSError as error:  # of the checkpoint's files, or of the draft's
        raise ModelLoadError(f"{error.filename or config.model} cannot be read: {error.strerror or error}") from error
    except MemoryError as error:  # which array did not fit
        raise ConfigError(f"these settings need more memory than there is: {error}") from error
    if config.prune is not None:
        check_default_pruning(config.prune, engine.info)
    limits = scheduler_config(
        engine.info,
        max_num_seqs=config.max_num_seqs,
        max_batch_tokens=config.max_batch_tokens,
        max_waiting=config.max_waiting,
        prefix_cache=config.prefix_cache,
        max_cache_ttl=config.max_cache_ttl,
        prunes_under_pressure=config.pressure == "prune",
        policy=config.policy,
        max_itl=None if config.max_itl_ms is None else config.max_itl_ms / 1000,
        max_waiting_tokens=config.max_waiting_tokens,
        queue_timeout=config.queue_timeout,
    )
    loop = EngineLoop(engine, Scheduler(limits))
    if config.cache_file is not None:
        load_cache(loop, Path(config.cache_file))
    return loop


class Wire:
    """The socket to the server. An input thread reads it; what it does not take at once, an output thread writes."""

    def __init__(self, descriptor: int) -> None:
        """`descriptor`: of a connected stream socket."""
        self.inbox: queue.SimpleQueue[ClientMessage | FetchedDraft | CompiledGrammar] = queue.SimpleQueue()
        self._outbox: queue.Queue[bytes | None] = queue.Queue()
        self._socket = socket.socket(fileno=descriptor)
        self._socket.set_inheritable(False)
        self._encoder = msgspec.msgpack.Encoder()
        self._sender = threading.Thread(target=self._send_all, name="quire-output", daemon=True)
        self._sender.start()
        threading.Thread(target=self._receive_all, name="quire-input", daemon=True).start()

    def send(self, message: EngineMessage) -> None:
        """Hand a message over, without waiting. For one thread.

        Mostly the socket has room: to wake the output thread would cost more than to write, and it would wait for the
        interpreter until the next step is on its way.
        """
        data = framed(self._encoder.encode(message))
        if not self._outbox.unfinished_tasks:
            try:
                data = data[self._socket.send(data, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                pass
            except OSError:  # the server is gone; the input thread ends the process
                return
        if data:
            self._outbox.put(data)

    def flush(self) -> None:
        """Wait until everything handed over has left; nothing can be sent afterwards."""
        self._outbox.put(None)
        self._sender.join(timeout=5)

    def _send_all(self) -> None:
        with suppress(OSError):
            while (data := self._outbox.get()) is not None:
                self._socket.sendall(data)
                self._outbox.task_done()

    def _receive_all(self) -> None:
        decoder, unframer = msgspec.msgpack.Decoder(ClientMessage), Unframer()
        with suppress(OSError):
            while piece := self._socket.recv(1 << 18):
                for message in unframer.feed(piece):
                    self.inbox.put(decoder.decode(message))
        os._exit(EXIT_PARENT_GONE)


def run(loop: EngineLoop, wire: Wire, config: EngineConfig) -> None:
    """Serve until `Shutdown` comes. Sends a report after each step and a heartbeat each second while idle."""
    gate = GrammarGate(loop, wire.inbox.put)
    while True:
        try:
            message = wire.inbox.get(block=not loop.has_work, timeout=HEARTBEAT_SECONDS)
        except queue.Empty:
            message = None
        while message is not None:
            if isinstance(message, Shutdown):
                return
            if isinstance(message, CompiledGrammar):
                gate.release(message)
            else:
                _handle(loop, gate, wire, config, message)
            message = None if wire.inbox.empty() else wire.inbox.get()
        wire.send(loop.step())


def _handle(
    loop: EngineLoop,
    gate: GrammarGate,
    wire: Wire,
    config: EngineConfig,
    message: Submit | Abort | ReplaceDraft | FetchedDraft,
) -> None:
    if isinstance(message, Submit):
        gate.submit(message.request)
    elif isinstance(message, Abort):
        loop.abort(message.request_id)
    elif isinstance(message, ReplaceDraft):
        fetch_draft(loop, message.folder, wire.inbox.put)
    else:
        wire.send(replace_draft(loop, config, message))


def main() -> int:
    """Entry point of the engine process; returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server decides what it means
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig)
    wire = Wire(int(sys.argv[1]))
    try:
        loop = load_loop(config, lambda phase, done, total: wire.send(Progress(phase, done, total)))
    except QuireError as error:
        wire.send(StartFailed(describe(error)))
        wire.flush()
        return 1
    wire.send(Ready(loop.engine.info))
    try:
        run(loop, wire, config)
    except Exception:
        # The state of scheduler and cache is unknown after a failed step: dying (and being restarted) is the honest
        # answer. Open requests fail with a clear error, which the server gives them.
        log.exception("a step failed; the engine process stops")
        return 1
    if config.cache_file is not None:
        save_cache(loop, Path(config.cache_file))
    wire.flush()
    return 0


if __name__ == "__main__":
    sys.stdout.flush()
    os._exit(main())  # skip interpreter teardown: threads and device libraries may hang in it
