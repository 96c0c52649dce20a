"""An engine in a process of its own: started once, asked many times, standing still in between."""

import json
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .turns import tell, turn

WORKER = Path(__file__).parent / "worker.py"


class PeerFailed(Exception):
    """The engine could not be started, gave an error, or took too long."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine made of a few prompts."""

    seconds: float
    """From handing over the prompts to having all tokens."""
    ids: list[list[int]]
    """The generated tokens."""


class Resident:
    """A started engine. Between `awake` blocks its processes are stopped, so that none of them can take time."""

    def __init__(self, python: Path, adapter: Path, settings: dict[str, Any], log: Path, limit: float) -> None:
        """Start it and wait until its model is loaded, `limit` seconds at most. Raises `PeerFailed`."""
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [python, "-P", WORKER, adapter],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                bufsize=1,
                start_new_session=True,
            )
        try:
            self.facts = self._ask(settings, limit)
        except BaseException:
            self.end()
            raise
        tell(self._process, signal.SIGSTOP)

    def awake(self) -> AbstractContextManager[None]:
        """It may run until the block's end."""
        return turn(self._process)

    def generate(self, prompts: Sequence[Sequence[int]], output: int, limit: float) -> Answer:
        """Greedily complete prompts; raises `PeerFailed` after `limit` seconds or the engine's error."""
        return Answer(**self._ask({"prompts": prompts, "output": output}, limit))

    def end(self) -> None:
        """End its processes."""
        tell(self._process, signal.SIGKILL)
        self._process.wait()

    def _ask(self, question: dict[str, Any], limit: float) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        deadline = time.monotonic() + limit
        with suppress(BrokenPipeError):  # what went wrong stands in its last answer
            self._process.stdin.write(json.dumps(question) + "\n")
        if not select.select([self._process.stdout], [], [], max(0, deadline - time.monotonic()))[0]:
            raise PeerFailed(f"no answer within {limit:.0f} s; see {self._log}")
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": "it ended"}
        if "error" in answer:
            raise PeerFailed(f"{answer['error']}; see {self._log}")
        return dict(answer)
