"""The rows of a round: known text, the target's own continuations, and the draft's, as DistillSpec mixes them.

On-policy data matter because a draft is asked to go on from what was said so far, and at the end of its proposal from
what it said itself. Continuations come from the engine that serves (see `Engines`). Known text that was logged with
what the target said at its tokens is taken with that, and needs no pass of the target.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from ..core.request import SamplingParams
from .prompts import Example
from .target_rows import Row

Source = Literal["fixed", "target", "draft"]
SELF = "self"
"""Domain of texts that the target begins by itself."""
OPENING_TOKENS = 8
"""Drawn tokens with which such a text begins, as long as prompts need be to differ from each other."""


class Engines(Protocol):
    """Runs checkpoints through the serving engine, offline."""

    def generate(
        self, checkpoint: str, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[list[int]]:
        """The generated tokens of each prompt, in order."""
        ...

    def step_seconds(self, checkpoint: str, sizes: Sequence[int]) -> dict[int, float]:
        """Seconds of a decode step of each number of sequences."""
        ...


@dataclass(frozen=True, slots=True)
class Mixture:
    """Shares of the rows of a round; they are scaled to sum to 1."""

    fixed: float = 0.4
    target: float = 0.4
    draft: float = 0.2

    def draw(self, rng: np.random.Generator, count: int) -> list[Source]:
        """The source of each row."""
        sources: list[Source] = ["fixed", "target", "draft"]
        shares = np.array([self.fixed, self.target, self.draft])
        return [sources[index] for index in rng.choice(3, count, p=shares / shares.sum())]

    def unknown(self) -> "Mixture":
        """Where no text is known: its share is the target's, too."""
        return Mixture(0.0, self.fixed + self.target, self.draft)


def self_examples(
    count: int, start: int | None, vocab_size: int, seed: int, target: str, engines: Engines
) -> list[Example]:
    """Beginnings of texts by the target itself: a few tokens drawn after the token `start` that begins texts, or after
    random ones where the model has none.

    Were there no more than `start`, what follows greedily would be one text for all.
    """
    random = np.random.default_rng(seed).integers(0, vocab_size, count).tolist()
    starts = [[token if start is None else start] for token in random]
    params = [
        SamplingParams(max_tokens=OPENING_TOKENS, min_tokens=OPENING_TOKENS, seed=seed + index)
        for index in range(count)
    ]
    openings = engines.generate(target, starts, params)
    return [Example((*begun, *rest), domain=SELF) for begun, rest in zip(starts, openings, strict=True)]


@dataclass(frozen=True, slots=True)
class RowMaker:
    """Makes the rows of rounds from examples; a pure function of seed and round, but for the draft's weights."""

    examples: Sequence[Example]
    mixture: Mixture
    length: int
    """Most tokens of a row."""
    temperatures: tuple[float, ...]
    """Of continuations, each row's drawn from these."""
    seed: int
    target: str
    """Checkpoint."""
    uses_logged: bool = True
    """Whether what was logged of the target's distributions is what is wanted of them."""

    def rows(self, number: int, count: int, draft: str, engines: Engines) -> list[Row]:
        """Rows of round `number`; `draft` is the checkpoint of the draft as it is now."""
        rng = np.random.default_rng((self.seed, number))
        sources = self.mixture.draw(rng, count)
        chosen = [self.examples[int(index)] for index in rng.integers(len(self.examples), size=count)]
        rows = [self.logged_row(example) or self._window(rng, example) for example in chosen]
        temperatures = rng.choice(np.array(self.temperatures), count)
        seeds = rng.integers(2**63, size=count)
        for source, checkpoint in (("target", self.target), ("draft", draft)):
            places = [index for index in range(count) if sources[index] == source]
            prompts = [self._prompt(chosen[index]) for index in places]
            params = [
                SamplingParams(
                    temperature=float(temperatures[index]),
                    max_tokens=self.length - len(prompt),
                    seed=int(seeds[index]),
                )
                for index, prompt in zip(places, prompts, strict=True)
            ]
            answers = engines.generate(checkpoint, prompts, params) if places else []
            for index, prompt, answer in zip(places, prompts, answers, strict=True):
                rows[index] = Row(prompt + answer)
        return rows

    def logged_row(self, example: Example) -> Row | None:
        """The beginning of a logged text with what the target said at its output.

        None where there is no such thing, or too little: the target knew the text from its beginning, so a row that
        says what it said must begin there, too. The last token says nothing of one after it, and is left out.
        """
        start, ids = len(example.prompt) - 1, [*example.prompt, *example.output][:-1]
        least = min(len(example.output), self.length // 4)
        if not self.uses_logged or example.logged is None or not least or self.length - start < least:
            return None
        return Row(ids[: self.length], start, example.logged)

    def _window(self, rng: np.random.Generator, example: Example) -> Row:
        """Known text: all of it, or a random stretch of a long one."""
        ids = [*example.prompt, *example.output]
        start = int(rng.integers(0, max(0, len(ids) - self.length) + 1))
        return Row(ids[start : start + self.length])

    def _prompt(self, example: Example) -> list[int]:
        """The prompt's end, leaving at least a quarter of the row to be written."""
        return list(example.prompt[-(self.length - self.length // 4) :])
