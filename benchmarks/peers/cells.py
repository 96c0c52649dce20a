"""What is measured, and what comes of the rounds."""

import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..intervals import median_interval
from .resident import Resident

FIRST_ID = 16
"""Of the ids that prompts are drawn from: past the special ones."""
ENOUGH_SECONDS = 0.6
MOST_TIMES = 5
"""A cell is repeated until that much time has passed, at most so often: some take a few milliseconds."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One thing to measure."""

    streams: int
    """Prompts at once."""
    prompt: int
    """Tokens of each."""
    output: int
    """Tokens generated for each; 1: the time to the first token is meant."""

    @property
    def title(self) -> str:
        """For the table."""
        if self.output == 1:
            return f"first token of {self.prompt:,}, ms"
        return f"{self.streams} stream{'s' if self.streams > 1 else ''}, tokens/s"

    def value(self, seconds: float) -> float:
        """Milliseconds to the first token, or output tokens per second."""
        return seconds * 1000 if self.output == 1 else self.streams * self.output / seconds

    def times_better(self, ours: float, theirs: float) -> float:
        """How many times as fast we are: above 1, we are faster."""
        return theirs / ours if self.output == 1 else ours / theirs


class Prompts:
    """Random token ids; never the same prompt again, so that no prefix cache has it."""

    def __init__(self, vocabulary: int, seed: str) -> None:
        self._random = random.Random(seed)
        self._vocabulary = vocabulary

    def take(self, cell: Cell) -> list[list[int]]:
        """For one run of a cell."""
        return [self._random.choices(range(FIRST_ID, self._vocabulary), k=cell.prompt) for _ in range(cell.streams)]


def play(engine: Resident, cell: Cell, prompts: Prompts, limit: float) -> float:
    """Median value of the repetitions; raises `PeerFailed`."""
    values: list[float] = []
    spent = 0.0
    while spent < ENOUGH_SECONDS and len(values) < MOST_TIMES:
        answer = engine.generate(prompts.take(cell), cell.output, limit)
        spent += answer.seconds
        values.append(cell.value(answer.seconds))
    return statistics.median(values)


Round = dict[str, dict[Cell, float]]
"""By engine: what it reached."""


def rows(rounds: Sequence[Round], cells: Sequence[Cell], names: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Per cell our median, and of each peer its median and how many times as fast we are, with its interval of 95 %."""
    for cell in cells:
        texts = []
        for name in names:
            both = [(one["quire"][cell], one[name][cell]) for one in rounds if cell in one.get(name, {})]
            if not both:
                texts.append("failed")
                continue
            text = f"{statistics.median(theirs for _, theirs in both):,.0f}"
            if name != "quire":
                ratios = [cell.times_better(*pair) for pair in both]
                low, high = median_interval(ratios)
                text += f" ({statistics.median(ratios):.2f}x, {low:.2f} to {high:.2f})"
            texts.append(text)
        yield cell.title, texts
