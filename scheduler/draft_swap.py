"""A draft model takes another's place, joins n-grams or leaves them, while requests are served: fetched beside the
steps, exchanged between two."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ..core.config import EngineConfig
from ..core.errors import QuireError, describe
from ..core.messages import DraftRefused, DraftReplaced
from .loop import EngineLoop


@runtime_checkable
class DraftReplacer(Protocol):
    """An engine whose draft model can be replaced, added or taken away."""

    def fetch_draft(self, folder: str) -> None:
        """Bring a draft's files near, on any thread; raises `QuireError`."""
        ...

    def replace_draft(self, folder: str, config: EngineConfig) -> None:
        """Draft with that model, or without one, from now on, and say so in `info`; raises `QuireError`, then nothing
        has changed."""
        ...


@dataclass(frozen=True, slots=True)
class FetchedDraft:
    """A draft whose files are near, or why they are not."""

    folder: str
    error: QuireError | None = None


def fetch_draft(loop: EngineLoop, folder: str, done: Callable[[FetchedDraft], None]) -> None:
    """Begin to fetch a draft; `done` is called on another thread."""
    engine = loop.engine
    assert isinstance(engine, DraftReplacer)

    def fetch() -> None:
        try:
            engine.fetch_draft(folder)
        except QuireError as error:
            done(FetchedDraft(folder, error))
        else:
            done(FetchedDraft(folder))

    threading.Thread(target=fetch, name="quire-draft", daemon=True).start()


def replace_draft(loop: EngineLoop, config: EngineConfig, fetched: FetchedDraft) -> DraftReplaced | DraftRefused:
    """Exchange the draft between two steps; what the scheduler has learnt of the old one is forgotten."""
    engine = loop.engine
    assert isinstance(engine, DraftReplacer)
    if fetched.error is not None:
        return DraftRefused(describe(fetched.error))
    try:
        engine.replace_draft(fetched.folder, config)
    except QuireError as error:
        return DraftRefused(describe(error))
    draft, speculation = loop.engine.info.draft, loop.scheduler.speculation
    assert draft is not None and speculation is not None, "who is replaced was there before"
    speculation.renew(draft)
    return DraftReplaced(draft)
