"""The log of served traffic that `quire distill --from-traffic` learns from; written only if the operator asks for it.

One JSON object a line and choice, tokens as the engine computed them, so that whoever reads it needs no template:

    {"prompt_ids": [...], "output_ids": [...], "target": {"version": 1, "top": 20, "rows": base64}}

`rows` holds one row of `core.top_rows` per output token: what the model said before that token was drawn. `target` is
missing where a request was not among the share that is recorded, and where it may be pruned: what the model says with
part of its context forgotten is not what a draft is to learn. The file holds what users wrote: it is for its owner's
eyes alone.
"""

import base64
import json
import logging
import os
import random
from pathlib import Path
from typing import Any

import msgspec

from ..core.errors import ConfigError
from ..core.messages import Event, Recorded, Tokens
from ..core.request import Request
from ..core.top_rows import VERSION, kept_tokens

MOST_BYTES = 4 * 2**30
"""A log as long as this is not written to any more: enough to learn from, and disks are finite."""
log = logging.getLogger("quire.traffic")


class TrafficLog:
    """Appends to a file; where that fails, logging ends and serving goes on."""

    def __init__(self, path: Path, share: float = 1.0) -> None:
        """Open or create the file; `share` of the requests are recorded. Raises `ConfigError` if that cannot be."""
        try:
            self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab", buffering=0)
        except OSError as error:
            raise ConfigError(f"cannot write to {path}: {error.strerror}", param="distill_log") from error
        self._path = path
        self._share = share
        self._open = True

    def entry(self, request: Request) -> "TrafficEntry":
        """Collects what is generated for a request."""
        recorded = self._open and request.prune is None and random.random() < self._share
        return TrafficEntry(self, msgspec.structs.replace(request, record=True) if recorded else request)

    def write(self, line: str) -> None:
        """Append a line, whole or not at all: what is learned from a log must be able to read all of it."""
        if not self._open:
            return
        content = f"{line}\n".encode()
        try:
            before = os.fstat(self._file.fileno()).st_size
            if before + len(content) > MOST_BYTES:
                self._end("it is full")
            elif self._file.write(content) < len(content):
                self._file.truncate(before)
                self._end("there is no room left")
        except OSError as error:
            self._end(error.strerror or str(error))

    def _end(self, reason: str) -> None:
        self._open = False
        log.warning("no more traffic is logged to %s: %s", self._path, reason)


class TrafficEntry:
    """The outputs of one request under way."""

    def __init__(self, target: TrafficLog, request: Request) -> None:
        self.request = request
        """What to ask the engine for."""
        self._log = target
        self._outputs: list[list[int]] = [[] for _ in range(request.params.n)]
        self._rows: list[list[bytes]] = [[] for _ in range(request.params.n)]

    def take(self, event: Event) -> None:
        """Remember what an event tells."""
        if isinstance(event, Tokens):
            self._outputs[event.index] += event.token_ids
        elif isinstance(event, Recorded):
            self._rows[event.index] += event.rows

    def close(self) -> None:
        """Write every choice that has tokens, complete or not: what was said was said by the model."""
        for output, rows in zip(self._outputs, self._rows, strict=True):
            if output:
                self._log.write(json.dumps(self._line(output, rows)))

    def _line(self, output: list[int], rows: list[bytes]) -> dict[str, Any]:
        line: dict[str, Any] = {"prompt_ids": self.request.prompt_ids, "output_ids": output}
        if len(rows) >= len(output):  # there may be more: of tokens behind the end
            packed = base64.b64encode(b"".join(rows[: len(output)])).decode()
            line["target"] = {"version": VERSION, "top": kept_tokens(rows[0]), "rows": packed}
        return line
