"""A real server process per module: `quire serve` on a free port, with the embedded model in float32."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI

from quire.scheduler.swap import SwapCosts

MODEL_NAME = "quire-mini"


@dataclass
class RunningServer:
    """A started server: its process, its address, what it printed so far."""

    process: subprocess.Popen[str]
    url: str
    ready_line: str

    def client(self) -> OpenAI:
        """The official client, without its own retries: a failure must show."""
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def async_client(self) -> AsyncOpenAI:
        """The same for asyncio."""
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)

    def metric(self, name: str) -> float:
        """Sum of a metric's samples."""
        text = httpx.get(f"{self.url}/metrics").text
        lines = [line for line in text.splitlines() if line.startswith((name + "{", name + " "))]
        assert lines, f"no metric {name}"
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def engine_pid(self) -> int:
        """Process id of the engine: the server's one child."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (pid,) = [int(child) for child in children]
        return pid

    def wait_until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Wait for `condition`, or fail."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "waited too long"
            time.sleep(0.05)

    def stop(self) -> int:
        """Ask it to end; returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


def start_server(*arguments: str) -> RunningServer:
    """Run `quire serve` with these arguments on a free port and wait for its ready line."""
    command = [sys.executable, "-m", "quire.server", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://\S+", line)
    if not found:
        process.kill()
        raise AssertionError(f"the server did not start: {line!r}, exit code {process.wait()}")
    return RunningServer(process, found[0], line)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """A server with the embedded model in float32, with a pool small enough that preemption happens."""
    running = start_server("--dtype", "float32", "--max-num-seqs", "32")
    yield running
    code = running.stop()
    assert code == 0


@pytest.fixture
def swapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is preempted is swapped, whatever it costs."""
    monkeypatch.setattr(SwapCosts, "swap_pays", lambda *_: True)
