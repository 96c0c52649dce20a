"""The server's handle on one engine process: its sockets, its exit, the messages both ways."""

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack

import msgspec
import zmq
import zmq.asyncio

from ..core.config import EngineConfig
from ..core.errors import ConfigError
from ..core.messages import ClientMessage, EngineMessage

SPIN_COUNT = "5000"
"""Looks of a waiting OpenMP thread, some 50 ns each, before it sleeps: longer than what lies between two steps of a
small model. libgomp's own 300,000 are for a machine that has nothing else to do: where the server or anybody else wants
a processor, they keep it from the thread that all wait for, at every one of a step's hundred meetings."""


class EngineProcess:
    """One engine process and the local sockets to it. A restarted engine is a new object with new sockets, so that
    nothing of the old one can arrive late."""

    def __init__(self, config: EngineConfig) -> None:
        """Raises `ConfigError` where the machine has no place for its sockets (`TMPDIR`) or no room for the process."""
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[EngineMessage] = msgspec.msgpack.Decoder(EngineMessage)
        self._context = zmq.asyncio.Context()
        try:
            with ExitStack() as undo:
                undo.callback(self._context.destroy, linger=0)
                folder = tempfile.mkdtemp(prefix="quire-")
                undo.callback(shutil.rmtree, folder, ignore_errors=True)
                self._start(f"ipc://{folder}/engine", config)
                self._taken = undo.pop_all()
        except (OSError, zmq.ZMQError) as error:
            raise ConfigError(f"the engine process cannot be started: {error}") from error

    def _start(self, address: str, config: EngineConfig) -> None:
        self._up = self._bind(zmq.PULL, address + ".up")
        self._down = self._bind(zmq.PUSH, address + ".down")
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "quire.scheduler.process", address],
            stdin=subprocess.PIPE,
            env=_environment(),
        )
        assert self._popen.stdin is not None
        self._popen.stdin.write(msgspec.json.encode(config))
        self._popen.stdin.close()

    def _bind(self, kind: int, address: str) -> zmq.asyncio.Socket:
        socket: zmq.asyncio.Socket = self._context.socket(kind)
        socket.linger = 0
        socket.set_hwm(0)
        socket.bind(address)
        return socket

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative for the signal that killed it."""
        return self._popen.poll()

    def send(self, message: ClientMessage) -> None:
        """Queue a message to the engine; messages sent before it listens wait for it."""
        self._down.send(self._encoder.encode(message))

    async def receive(self) -> EngineMessage:
        """The next message of the engine; waits for ever if it is dead."""
        return self._decoder.decode(await self._up.recv())

    async def wait(self, seconds: float) -> bool:
        """Wait for it to end; False if it still runs after `seconds`."""
        deadline = asyncio.get_running_loop().time() + seconds
        while self.exit_code is None:
            if asyncio.get_running_loop().time() >= deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    def close(self) -> None:
        """Kill it if it runs, and give back sockets and files."""
        if self.exit_code is None:
            self._popen.kill()
        self._popen.wait()
        self._taken.close()


def _environment() -> dict[str, str]:
    """Of the engine process. How long its threads wait for each other before they sleep is the operator's to say."""
    said = os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    waiting = {} if said else {"GOMP_SPINCOUNT": SPIN_COUNT}
    return {**os.environ, "TOKENIZERS_PARALLELISM": "false", **waiting}
