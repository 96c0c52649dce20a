"""The server's handle on one engine process: its socket, its exit, the messages both ways."""

import asyncio
import os
import socket
import subprocess
import sys
from contextlib import ExitStack

import msgspec

from ..core.config import EngineConfig
from ..core.errors import ConfigError
from ..core.messages import ClientMessage, EngineMessage
from .framing import Unframer, framed

SPIN_COUNT = "5000"
"""Looks of a waiting OpenMP thread, some 50 ns each, before it sleeps: longer than what lies between two steps of a
small model. libgomp's own 300,000 are for a machine that has nothing else to do: where the server or anybody else wants
a processor, they keep it from the thread that all wait for, at every one of a step's hundred meetings."""


class EngineProcess:
    """One engine process and the socket to it. A restarted engine is a new object with a new socket, so that nothing of
    the old one can arrive late."""

    def __init__(self, config: EngineConfig) -> None:
        """Start it; within a running event loop. Raises `ConfigError` where the machine has no room for it."""
        self._loop = asyncio.get_running_loop()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[EngineMessage] = msgspec.msgpack.Decoder(EngineMessage)
        self._unframer = Unframer()
        self._inbox: asyncio.Queue[EngineMessage] = asyncio.Queue()
        self._unsent = bytearray()
        try:
            self._socket, self._popen = _start()
        except OSError as error:
            raise ConfigError(f"the engine process cannot be started: {error}") from error
        self._socket.setblocking(False)
        self._loop.add_reader(self._socket, self._read)
        assert self._popen.stdin is not None
        self._popen.stdin.write(msgspec.json.encode(config))
        self._popen.stdin.close()

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative for the signal that killed it."""
        return self._popen.poll()

    def send(self, message: ClientMessage) -> None:
        """Send a message, without waiting; messages sent before it listens wait for it, to a dead one they are lost."""
        waiting = bool(self._unsent)
        self._unsent += framed(self._encoder.encode(message))
        if not waiting:
            self._write()
            if self._unsent:
                self._loop.add_writer(self._socket, self._write)

    async def receive(self) -> EngineMessage:
        """The next message of the engine; waits for ever if it is dead."""
        return await self._inbox.get()

    def _read(self) -> None:
        try:
            piece = self._socket.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        if not piece:  # it ended, and all it said was read
            self._loop.remove_reader(self._socket)
        for message in self._unframer.feed(piece):
            self._inbox.put_nowait(self._decoder.decode(message))

    def _write(self) -> None:
        try:
            del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent.clear()
        if not self._unsent:
            self._loop.remove_writer(self._socket)

    async def wait(self, seconds: float) -> bool:
        """Wait for it to end; False if it still runs after `seconds`."""
        deadline = asyncio.get_running_loop().time() + seconds
        while self.exit_code is None:
            if asyncio.get_running_loop().time() >= deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    def close(self) -> None:
        """Kill it if it runs, and give back the socket; once more does nothing."""
        if self.exit_code is None:
            self._popen.kill()
        self._popen.wait()
        if self._socket.fileno() < 0:
            return
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()


def _start() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """The process, which waits for its settings, and our end of the socket to it."""
    with ExitStack() as undo:
        ours, theirs = socket.socketpair()
        undo.callback(ours.close)
        with theirs:
            command = [sys.executable, "-m", "quire.scheduler.process", str(theirs.fileno())]
            popen = subprocess.Popen(command, stdin=subprocess.PIPE, env=_environment(), pass_fds=[theirs.fileno()])
        undo.pop_all()
    return ours, popen


def _environment() -> dict[str, str]:
    """Of the engine process. How long its threads wait for each other before they sleep is the operator's to say."""
    said = os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    waiting = {} if said else {"GOMP_SPINCOUNT": SPIN_COUNT}
    return {**os.environ, "TOKENIZERS_PARALLELISM": "false", **waiting}
