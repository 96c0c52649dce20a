"""What the benchmarks of pruning share: requests of code from the standard library, and a loop that is watched."""

import itertools
import random
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

from quire.core.config import EngineConfig
from quire.core.ids import RequestId
from quire.core.messages import EngineStats, Event, single_events
from quire.core.pruning import PruneParams
from quire.core.request import Request, SamplingParams
from quire.scheduler.client import load_in_process
from quire.scheduler.loop import EngineLoop
from quire.server.text import Tokenizer

Watch = Callable[[EngineStats, Sequence[Event]], None]
_names = itertools.count()


def load(model: str, **settings: object) -> EngineLoop:
    """A loop without prefix cache: all prompts are computed; and without drafts: one token a step."""
    config = {"model": model, "prefix_cache": False, "max_waiting": 2**20, "draft": "none"} | settings
    return load_in_process(EngineConfig.of(config))


class Prompts:
    """Slices of the standard library's sources as requests."""

    def __init__(self, model: str, seed: int = 0) -> None:
        self._tokenizer = Tokenizer.load(model)
        folder = Path(sysconfig.get_paths()["stdlib"])
        self._ids = self._tokenizer.encode(
            "".join((folder / f"{n}.py").read_text() for n in ("argparse", "ast", "inspect"))
        )
        self._random = random.Random(seed)

    def take(self, length: int) -> list[int]:
        """A random slice."""
        start = self._random.randrange(len(self._ids) - length)
        return self._ids[start : start + length]

    def request(self, prompt: Sequence[int], output: int, prune: PruneParams | None) -> Request:
        """Greedy, of a set length, under a fresh name."""
        return Request(
            id=RequestId(f"benchmark-{next(_names)}"),
            prompt_ids=tuple(prompt),
            params=SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True),
            prune=prune,
            repeat_ids=self._tokenizer.repeat_ids if prune else (),
        )


def drain(loop: EngineLoop, requests: Sequence[Request], watch: Watch) -> None:
    """Run the requests to their end; `watch` sees each step."""
    for request in requests:
        loop.submit(request)
    while loop.has_work:
        report = loop.step()
        watch(report.stats, list(single_events(report.events)))
