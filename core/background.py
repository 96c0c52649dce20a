"""Threads for work that may take long and that nobody else is to feel."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

_NICENESS = 10
"""Such a thread gets about a tenth of what an ordinary one does, where both want the same core."""
_THREADS = 16
"""More than there are cores to spare: they share those, so a small piece of work overtakes large ones."""


def background_pool(name: str) -> ThreadPoolExecutor:
    """A pool of threads that give way to all others, where the system ranks threads one by one."""
    return ThreadPoolExecutor(_THREADS, name, initializer=_give_way)


def _give_way() -> None:
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
