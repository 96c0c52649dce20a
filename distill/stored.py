"""Files of a run: read back whole or refused in one line, and a folder that one run at a time works in."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from ..core.errors import ConfigError, QuireError


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within the block a file of the run is read; raises `ConfigError` if it is damaged or missing."""
    try:
        yield
    except QuireError:
        raise
    except Exception as error:  # each library has its own for a file that is none of its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"{path} is damaged ({reason}): begin anew with another --out", param="out") from error


@contextmanager
def storing(folder: Path) -> Iterator[None]:
    """Within the block a run writes; raises `ConfigError` where there is no room or leave."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"the run in {folder} cannot go on: {error}; the same command continues from where it last saved",
            param="out",
        ) from error


def lock(folder: Path) -> IO[str]:
    """Keep other runs out of the folder until the file is closed, and remove what a killed one left half written.

    Raises `ConfigError` while another run is at work there, `OSError` if the folder cannot be written to.
    """
    file = (folder / "lock").open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ConfigError(f"another run is at work in {folder}; choose another --out", param="out") from error
    for left in (*folder.glob(".export-*"), *folder.glob("*.partial")):
        shutil.rmtree(left, ignore_errors=True)
    return file
