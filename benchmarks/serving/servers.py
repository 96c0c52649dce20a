"""A server in processes of its own: started once, standing still when it is not its turn. Linux only."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from ..peers.turns import tell, turn

START_SECONDS = 900.0
"""The first start of some compiles."""
END_SECONDS = 20.0


class ServerFailed(Exception):
    """It did not start, or is gone."""


class ServerProcess:
    """A command that serves HTTP. Between `awake` blocks all its processes are stopped."""

    def __init__(
        self, command: Sequence[str], port: int, ready: str, log: Path, environment: dict[str, str] | None = None
    ) -> None:
        """Start it and wait until a GET of the path `ready` is answered with 200. Raises `ServerFailed`."""
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | (environment or {}),
                start_new_session=True,
            )
        try:
            self._wait(ready)
        except BaseException:
            self.end()
            raise
        tell(self._process, signal.SIGSTOP)

    def awake(self) -> AbstractContextManager[None]:
        """It may run until the block's end."""
        return turn(self._process)

    def cpu_seconds(self) -> float:
        """User and system time of all its processes so far."""
        return sum(cpu for session, cpu in _processes() if session == self._process.pid)

    def end(self) -> None:
        """End its processes, in an orderly way if they do so soon."""
        tell(self._process, signal.SIGTERM)
        tell(self._process, signal.SIGCONT)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        tell(self._process, signal.SIGKILL)
        self._process.wait()

    def _wait(self, ready: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerFailed(f"it ended with exit code {self._process.returncode}; see {self._log}")
            with suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                urllib.request.urlopen(self.url + ready, timeout=5).read()
                return
            time.sleep(0.2)
        raise ServerFailed(f"it was not ready after {START_SECONDS:.0f} s; see {self._log}")


def end_with_servers() -> None:
    """Let SIGTERM unwind this program, so that no server outlives it."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _processes() -> Iterator[tuple[int, float]]:
    """(Session, processor seconds) of each process."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            fields = stat.read_text().rsplit(") ", 1)[1].split()
            yield int(fields[3]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
