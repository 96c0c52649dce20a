"""Computed prefixes over a restart: which blocks go to the file, and where they come back to.

Nothing here stops a server.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from ..core.errors import QuireError
from ..core.prefix import StoredBlock
from .loop import EngineLoop

log = logging.getLogger("quire")


@runtime_checkable
class PrefixKeeper(Protocol):
    """An engine that can write computed prefixes to a file and read them."""

    def save_prefixes(self, path: Path, blocks: Sequence[StoredBlock]) -> None:
        """Write blocks to a file; raises `OSError` or `QuireError`."""
        ...

    def stored_prefixes(self, path: Path) -> list[bytes]:
        """Names of the blocks in a file; raises `QuireError` if they cannot be used here."""
        ...

    def load_prefixes(self, path: Path, skipped: int, blocks: Sequence[StoredBlock]) -> None:
        """Read the blocks after the `skipped` first ones; raises `QuireError`."""
        ...


def save_cache(loop: EngineLoop, path: Path) -> None:
    """Write the prefixes that no sequence uses; a failure is one line in the log."""
    blocks, engine = loop.scheduler.prefixes.stored(), loop.engine
    assert isinstance(engine, PrefixKeeper)
    try:
        engine.save_prefixes(path, blocks)
    except (OSError, QuireError) as error:
        log.error("the computed prefixes could not be written to %s: %s", path, error)
    else:
        log.info("%d blocks of computed prefixes written to %s", len(blocks), path)


def load_cache(loop: EngineLoop, path: Path) -> None:
    """Take up the prefixes of an earlier run, the most recently used ones if not all fit; before the first request.

    No file is no error; one that is broken or of another model is one line in the log.
    """
    if not path.exists():
        return
    engine = loop.engine
    assert isinstance(engine, PrefixKeeper)
    try:
        digests = engine.stored_prefixes(path)
        blocks = loop.scheduler.prefixes.adopt(digests)
        try:
            engine.load_prefixes(path, len(digests) - len(blocks), blocks)
        except QuireError:
            loop.scheduler.prefixes.reclaim_all()
            raise
    except QuireError as error:
        log.warning("the computed prefixes are not used: %s", error.message)
    else:
        log.info("%d of %d blocks of computed prefixes read from %s", len(blocks), len(digests), path)
