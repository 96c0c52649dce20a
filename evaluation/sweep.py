"""The sweep: every task at every length, unpruned first, then under every policy and share kept.

One prompt runs at a time, in chunks of a set size, so that it is known where a prompt's context ends and its cache is
pruned, and so that times can be compared. All settings get the same trials.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np

from ..core.errors import InvalidRequestError
from ..core.messages import EngineStats
from ..core.pruning import PruneCounts
from .cells import Cell, Outputs, Setting, cells
from .material import Material
from .tasks import TASKS, Place
from .trial import Completion, Model, Trial


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is to be measured. Raises `InvalidRequestError` for what cannot be."""

    settings: Sequence[Setting]
    tasks: Sequence[str]
    lengths: Sequence[int]
    samples: int
    chunk: int
    """Tokens of a prompt chunk: the engine's `max_batch_tokens`."""
    seed: int = 0

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in TASKS:
                raise InvalidRequestError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
        if self.samples < 1:
            raise InvalidRequestError(f"at least 1 sample is needed, got {self.samples}")

    @property
    def prompts(self) -> int:
        """How many will be computed."""
        return self.samples * len(self.tasks) * len(self.lengths) * (1 + len(self.settings))

    def trials(self, material: Material, task: str, length: int) -> list[Trial]:
        """Equal for equal seeds, whatever else is measured."""
        return [
            TASKS[task].make(material, self._random(task, length, index), Place(index, length, self.chunk))
            for index in range(self.samples)
        ]

    def _random(self, task: str, length: int, index: int) -> np.random.Generator:
        return np.random.default_rng(random.Random(f"{self.seed} {task} {length} {index}").getrandbits(64))

    def run(self, model: Model, material: Material, tick: Callable[[str], None]) -> Iterator[Cell]:
        """Cells as they are done, the unpruned ones of a task and length first; `tick` is called after each prompt."""
        plan = [(length, task, self.trials(material, task, length)) for length in self.lengths for task in self.tasks]
        model.generate([plan[0][2][0].prompt[: self.chunk]], Trial([], 4).params, progress=False)  # compiles, allocates
        for length, task, trials in plan:
            unpruned = _complete(model, trials, Setting(), tick)
            yield from cells(model.info, task, length, trials, unpruned, unpruned)
            for setting in self.settings:
                outputs = _complete(model, trials, setting, tick)
                yield from cells(model.info, task, length, trials, outputs, unpruned)


def _complete(model: Model, trials: Sequence[Trial], setting: Setting, tick: Callable[[str], None]) -> Outputs:
    """Run the trials, one after another."""
    before = _counts(model.stats, setting.policy)
    completions: list[Completion] = []
    seconds, tokens = 0.0, 0
    for trial in trials:
        started = time.perf_counter()
        (completion,) = model.generate([trial.prompt], trial.params, prune=setting.params, progress=False)
        seconds += time.perf_counter() - started
        tokens += len(trial.prompt) + len(completion.choices[0].token_ids) - 1
        completions.append(completion)
        tick(str(setting))
    after = _counts(model.stats, setting.policy)
    counts = PruneCounts(
        entries=after.entries - before.entries,
        pages=after.pages - before.pages,
        seconds=after.seconds - before.seconds,
    )
    return Outputs(setting, completions, seconds, tokens, counts)


def _counts(stats: EngineStats, policy: str) -> PruneCounts:
    """What the policy did up to now, as a value: the engine goes on counting in its own."""
    return copy(stats.prunes.get(policy, PruneCounts()))
