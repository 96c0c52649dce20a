"""N-grams and a model that draft together: each gets the length that is worth it, in simulated time."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from quire.core.plan import IntArray
from quire.core.speculation import DraftInfo, StepCosts
from quire.scheduler.draft_batch import Candidates, Lengths, Outcome
from quire.scheduler.draft_length import DraftLengths

MOST, BUDGET = 8, 4096


@dataclass(frozen=True)
class Scene:
    """A machine and what is written on it."""

    step: Callable[[int], float]
    """Seconds by rows."""
    draft: Callable[[int], float]
    """Seconds of one more token by the model, for so many sequences."""
    found: Callable[[int], float]
    """How often n-grams find something for this sequence."""
    ngram: float
    """How often a token of theirs is right, once those before it are."""
    model: float

    def info(self) -> DraftInfo:
        counts = (1, 2, 4, 8, 16, 32, 64, 128, 256, 576)
        costs = StepCosts(rows=[(n, self.step(n)) for n in counts], drafts=[(n, self.draft(n)) for n in (1, 4, 16, 64)])
        return DraftInfo(method="hybrid", name="x", most=MOST, costs=costs)

    def goodput(self, pair: tuple[int, int], size: int) -> float:
        """Expected tokens per second, about, at lengths of n-grams and model that never change."""
        found = np.array([self.found(sequence) for sequence in range(size)])
        gains = [sum(rate**place for place in range(1, length + 1))
                 for rate, length in zip((self.ngram, self.model), pair, strict=True)]  # fmt: skip
        by_ngrams, by_model = float(found.sum()), float((1 - found).sum())
        seconds = self.step(round(size + by_ngrams * pair[0] + by_model * pair[1]))
        seconds += pair[1] * self.draft(max(1, round(by_model))) if by_model else 0.0
        return (size + by_ngrams * gains[0] + by_model * gains[1]) / seconds


def some(sequence: int) -> float:
    return 0.4


def unlike(sequence: int) -> float:
    """Half of them repeat themselves, the others never do."""
    return float(sequence % 2)


SCENES = {
    "memory bound": Scene(lambda rows: 0.03 + 0.0003 * rows, lambda n: 0.003 + 0.0001 * n, some, 0.8, 0.7),
    "compute bound": Scene(lambda rows: max(0.012, 0.0003 * rows), lambda n: 0.0008 + 0.00008 * n, some, 0.9, 0.5),
    "unlike sequences": Scene(lambda rows: max(0.012, 0.0003 * rows), lambda n: 0.001 + 0.0001 * n, unlike, 0.9, 0.6),
    "dear passes": Scene(lambda rows: 0.0015 + 0.00002 * rows, lambda n: 0.0012 + 0.00002 * n, some, 0.9, 0.7),
    "a bad model": Scene(lambda rows: 0.03 + 0.0003 * rows, lambda n: 0.003 + 0.0001 * n, some, 0.8, 0.1),
    "bad n-grams": Scene(lambda rows: 0.03 + 0.0003 * rows, lambda n: 0.003 + 0.0001 * n, some, 0.2, 0.8),
}


@dataclass
class Run:
    """A batch that decodes for ever."""

    scene: Scene
    lengths: DraftLengths | Lengths
    """Who chooses, or lengths of each sequence that never change."""
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    by_model: list[int] = field(default_factory=list)
    """Tokens that the model drew in each step."""
    proposed: list[int] = field(default_factory=list)
    """All draft tokens."""
    foreseen: IntArray | None = None

    def step(self, size: int) -> None:
        slots, known = np.arange(size, dtype=np.int32), np.full(size, 50 + self.steps, np.int32)
        drew = self.foreseen == 0 if self.foreseen is not None else self._draw(size) == 0
        asked = self._asked(slots, known)
        drafted = np.where(drew, asked.model, asked.most).astype(np.int32)
        rates = [self.scene.model if one else self.scene.ngram for one in drew]
        accepted = np.array([self._accepted(*draft) for draft in zip(rates, drafted, strict=True)], np.int32)
        noise, rows, drawn = 1 + 0.1 * self.rng.uniform(-1, 1), size + int(drafted.sum()), drafted * drew
        verify = noise * self.scene.step(rows)
        propose = noise * sum(
            self.scene.draft(int((drawn > place).sum())) for place in range(int(drawn.max(initial=0)))
        )
        some = asked.most > 0
        columns = (slots, asked.most, asked.model, drafted, drawn, accepted, known)
        outcome = Outcome(*(column[some] for column in columns)) if some.any() else None
        if isinstance(self.lengths, DraftLengths):
            self.lengths.learn(outcome, rows, verify, propose, pure=True)
        self.seconds += verify + propose
        self.tokens += size + int(accepted.sum())
        self.steps += 1
        self.by_model.append(int(drawn.sum()))
        self.proposed.append(int(drafted.sum()))

    def _asked(self, slots: IntArray, known: IntArray) -> Lengths:
        if isinstance(self.lengths, Lengths):
            return self.lengths
        foreseen, self.foreseen = self.foreseen, None
        if self.lengths.foresees(len(slots)):
            self.foreseen = self._draw(len(slots))
        found = foreseen is not None and bool(foreseen.any())
        if self.lengths.idle(len(slots)) or not (found or not self.lengths.only_foreseen(len(slots))):
            return Lengths.none(len(slots))
        full = np.full(len(slots), MOST, np.int32)
        arrivals = slots.astype(np.int64)
        size = len(slots)
        return self.lengths.choose(Candidates(slots, arrivals, known, known, full, size, size, BUDGET, foreseen))

    def _draw(self, size: int) -> IntArray:
        """What n-grams have for each sequence."""
        return np.array([16 * (self.rng.random() < self.scene.found(slot)) for slot in range(size)], np.int32)

    def _accepted(self, rate: float, count: int) -> int:
        return next((place for place in range(count) if self.rng.random() >= rate), count)

    def goodput(self, size: int, steps: int) -> float:
        """Tokens per second of so many steps."""
        for _ in range(steps):
            self.step(size)
        return self.tokens / self.seconds


def fixed(pair: tuple[int, int], size: int) -> Lengths:
    by_model = np.full(size, pair[1], np.int32)
    return Lengths(np.maximum(by_model, pair[0]), by_model)


def chosen(scene: Scene) -> Run:
    return Run(scene, DraftLengths(scene.info(), 64))


@pytest.mark.parametrize("size", [1, 8, 64])
@pytest.mark.parametrize("name", SCENES)
def test_no_fixed_pair_of_lengths_gives_notably_more(name: str, size: int) -> None:
    scene, steps = SCENES[name], 1000 if size < 64 else 300
    pairs = [(ngram, model) for ngram in range(MOST + 1) for model in range(ngram + 1)]
    promising = sorted(pairs, key=lambda pair: scene.goodput(pair, size))[-2:]
    best = max(Run(scene, fixed(pair, size)).goodput(size, steps) for pair in promising)
    assert chosen(scene).goodput(size, steps) >= 0.95 * best


def test_a_large_batch_leaves_the_model_out_and_keeps_n_grams() -> None:
    scene, run = SCENES["dear passes"], chosen(SCENES["dear passes"])
    assert run.goodput(64, 300) > 1.2 * 64 / scene.step(64)
    assert np.mean(np.array(run.by_model[-100:]) > 0) < 0.1
    assert np.mean(run.proposed[-100:]) > 64


def test_a_model_that_gets_better_is_found_out() -> None:
    """Though it is not asked for, because n-grams alone are better than with it."""
    run = chosen(SCENES["a bad model"])
    run.goodput(4, 600)
    assert np.mean(run.by_model[300:]) < 0.5
    run.scene = SCENES["memory bound"]
    run.goodput(4, 8000)
    assert np.mean(run.by_model[-200:]) > 3


def test_a_model_that_does_not_pay_is_hardly_thought_of_where_n_grams_have_nothing() -> None:
    run = chosen(replace(SCENES["dear passes"], found=lambda sequence: 0.1, model=0.1))
    assert isinstance(run.lengths, DraftLengths)
    choose, steps = run.lengths.choose, list[int]()

    def watched(batch: Candidates) -> Lengths:
        if batch.foreseen is not None and not batch.foreseen.any():
            steps.append(run.steps)
        return choose(batch)

    run.lengths.choose = watched  # type: ignore[method-assign]
    run.goodput(1, 1000)
    assert run.lengths.on and sum(step > 200 for step in steps) < 80, "of 720 such steps"
