"""The log of served traffic that `quire distill --from-traffic` learns from; written only if the operator asks for it.

One JSON object a line and choice, {"prompt_ids": [...], "output_ids": [...]}: tokens, as the engine computed them, so
that whoever reads it needs no template. It holds what users wrote: the file is for its owner's eyes alone.
"""

import json
import logging
import os
from pathlib import Path

from ..core.errors import ConfigError
from ..core.messages import Event, Tokens
from ..core.request import Request

MOST_BYTES = 4 * 2**30
"""A log as long as this is not written to any more: enough to learn from, and disks are finite."""
log = logging.getLogger("quire.traffic")


class TrafficLog:
    """Appends to a file; where that fails, logging ends and serving goes on."""

    def __init__(self, path: Path) -> None:
        """Open or create the file. Raises `ConfigError` if that cannot be."""
        try:
            self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write to {path}: {error.strerror}", param="distill_log") from error
        self._path = path
        self._open = True

    def entry(self, request: Request) -> "TrafficEntry":
        """Collects what is generated for a request."""
        return TrafficEntry(self, request)

    def write(self, line: str) -> None:
        """Append a line, whole."""
        if not self._open:
            return
        try:
            if self._file.tell() + len(line) > MOST_BYTES:
                self._end("it is full")
                return
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            self._end(error.strerror or str(error))

    def _end(self, reason: str) -> None:
        self._open = False
        log.warning("no more traffic is logged to %s: %s", self._path, reason)


class TrafficEntry:
    """The outputs of one request under way."""

    def __init__(self, target: TrafficLog, request: Request) -> None:
        self._log = target
        self._prompt = request.prompt_ids
        self._outputs: list[list[int]] = [[] for _ in range(request.params.n)]

    def take(self, event: Event) -> None:
        """Remember the tokens of an event."""
        if isinstance(event, Tokens):
            self._outputs[event.index] += event.token_ids

    def close(self) -> None:
        """Write every choice that has tokens, complete or not: what was said was said by the model."""
        for output in self._outputs:
            if output:
                self._log.write(json.dumps({"prompt_ids": self._prompt, "output_ids": output}))
