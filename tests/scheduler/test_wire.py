"""The two ends of the socket between server and engine process."""

import asyncio
import random
import socket
import subprocess
import sys

import msgspec
import pytest

from quire.core.config import EngineConfig
from quire.core.ids import RequestId
from quire.core.messages import Abort, Progress
from quire.scheduler import engine_process
from quire.scheduler.framing import Unframer, framed

COUNT = 200
SAYS_MUCH_AND_ENDS = f"""
import os, sys
from quire.core.messages import Progress
from quire.scheduler.process import Wire
wire = Wire(int(sys.argv[1]))
for number in range({COUNT}):
    wire.send(Progress("x" * 500_000, number, {COUNT}))
wire.flush()
os._exit(0)
"""
ECHOES = """
import sys
from quire.core.messages import Progress
from quire.scheduler.process import Wire
wire = Wire(int(sys.argv[1]))
while True:
    wire.send(Progress(wire.inbox.get().request_id, 0, 0))
"""


def start(script: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    with theirs:
        number = theirs.fileno()
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(number)], stdin=subprocess.DEVNULL, pass_fds=[number]
        )
    return process, ours


def test_messages_are_whole_however_the_stream_was_cut() -> None:
    chance, unframer = random.Random(1), Unframer()
    messages = [chance.randbytes(chance.choice((0, 1, 3, 4, 5, 70, 300))) for _ in range(200)]
    stream = b"".join(framed(message) for message in messages)
    arrived: list[bytes] = []
    while stream:
        cut = chance.choice((1, 2, 3, 5, 50, 1000))
        arrived += unframer.feed(stream[:cut])
        stream = stream[cut:]
    assert arrived == messages


def test_what_was_said_before_the_end_arrives() -> None:
    """However much of it was still on its way: an engine that cannot start says why, and ends at once."""
    process, ours = start(SAYS_MUCH_AND_ENDS)
    unframer, decoder, arrived = Unframer(), msgspec.msgpack.Decoder(Progress), list[int]()
    with ours:
        while piece := ours.recv(1 << 20):
            arrived += [decoder.decode(message).done for message in unframer.feed(piece)]
    assert (process.wait(10), arrived) == (0, list(range(COUNT)))


def test_an_engine_without_a_server_ends() -> None:
    process, ours = start(ECHOES)
    assert process.poll() is None
    ours.close()
    assert process.wait(30) == 3


async def test_the_server_waits_neither_for_room_nor_for_a_dead_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages that do not fit into the socket leave later, in order; what is sent to a dead engine is lost."""
    popen = subprocess.Popen

    def start_echo(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        return popen([sys.executable, "-c", ECHOES, command[-1]], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(engine_process.subprocess, "Popen", start_echo)
    engine = engine_process.EngineProcess(EngineConfig(model="any"))
    names = [str(number) * 100_000 for number in range(30)]
    for name in names:
        engine.send(Abort(RequestId(name)))
    async with asyncio.timeout(60):
        assert [(await engine.receive()).phase for _ in names] == names  # type: ignore[union-attr]
        engine._popen.kill()
        await engine.wait(10)
        await asyncio.sleep(0.05)
        for name in names:
            engine.send(Abort(RequestId(name)))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.receive(), 0.05)
    engine.close()
    engine.close()
