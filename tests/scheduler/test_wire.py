"""The engine process's side of the sockets."""

import subprocess
import sys
import tempfile

import zmq

COUNT = 200
SAYS_MUCH_AND_ENDS = f"""
import os, sys
from quire.core.messages import Progress
from quire.scheduler.process import Wire
wire = Wire(sys.argv[1])
for number in range({COUNT}):
    wire.send(Progress("x" * 500_000, number, {COUNT}))
wire.flush()
os._exit(0)
"""


def test_what_was_said_before_the_end_arrives() -> None:
    """However much of it was still on its way: an engine that cannot start says why, and ends at once."""
    with tempfile.TemporaryDirectory() as folder, zmq.Context() as context, context.socket(zmq.PULL) as up:
        up.set_hwm(0)
        address, arrived, running = f"ipc://{folder}/engine", 0, True
        up.bind(f"{address}.up")
        process = subprocess.Popen([sys.executable, "-c", SAYS_MUCH_AND_ENDS, address], stdin=subprocess.DEVNULL)
        while arrived < COUNT and running:
            running = process.poll() is None
            while up.poll(500):
                up.recv()
                arrived += 1
        assert (process.wait(10), arrived) == (0, COUNT)
