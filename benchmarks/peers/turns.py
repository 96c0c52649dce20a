"""Programs that take turns: who is not to run is stopped, with all the processes it started. Linux only."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


def tell(process: subprocess.Popen[Any], number: signal.Signals) -> None:
    """Send a signal to all processes of the session that `process` leads, if any are left."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


@contextmanager
def turn(process: subprocess.Popen[Any]) -> Iterator[None]:
    """The stopped session may run until the block's end."""
    tell(process, signal.SIGCONT)
    try:
        yield
    finally:
        tell(process, signal.SIGSTOP)
