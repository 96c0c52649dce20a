"""The tasks: what a model must still know after its cache was pruned. In the manner of RULER (Hsieh et al. 2024).

Two kinds. A *generated* answer: the prompt ends with the question, so a policy that looks at the last queries knows
what will be needed. The first token of such an answer comes from the step that computed the prompt's end; all
others, and answers have several, from the pruned cache. A *scored* tail: the context fills whole chunks of the
prompt, the questions and true answers follow in the next chunk, and what the model thought of each token is looked at;
the cache was pruned before any question was seen. An answer is right when each of its tokens is the most likely one,
which is the same as greedy generation giving it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.errors import InvalidRequestError
from .material import Fact, Material
from .scoring import Scorer, agreeing, agreeing_from_start, answered, copied, log_loss, recalled, recalled_all
from .trial import Trial

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
KEYS = 8
QUERIES = 4
HOPS = 4
COPIED = 48
CUE = 8
"""Tokens of a copied block that are not scored: they say which block it is."""
CONTINUED = 128
GENERATED = 64
SUMS = 16


@dataclass(frozen=True, slots=True)
class Place:
    """Where a trial is made: its number (it sets depths), prompt tokens wanted, and tokens of a prompt chunk."""

    index: int
    length: int
    chunk: int


Maker = Callable[[Material, np.random.Generator, Place], Trial]


@dataclass(frozen=True, slots=True)
class Task:
    """How trials are made, and the measures that are taken of each."""

    make: Maker
    measures: dict[str, Scorer]
    """Name of the measure -> its scorer."""
    tail: bool = False
    """Whether a tail is scored, and not an output."""


def needle(material: Material, rng: np.random.Generator, place: Place) -> Trial:
    """One fact at a set depth, asked for at the end."""
    (fact,) = material.facts(rng, 1)
    return _generated(material, rng, place, [fact.line], fact.head, fact)


def multi_key(material: Material, rng: np.random.Generator, place: Place) -> Trial:
    """Many facts at random depths, one of them asked for."""
    facts = material.facts(rng, KEYS)
    asked = facts[int(rng.integers(KEYS))]
    return _generated(material, rng, place, [fact.line for fact in facts], asked.head, asked)


def multi_query(material: Material, rng: np.random.Generator, place: Place) -> Trial:
    """Many facts, several of them asked for; nobody knew which when the cache was pruned."""
    facts = material.facts(rng, KEYS)
    asked = [facts[int(i)] for i in rng.permutation(KEYS)[:QUERIES]]
    return _scored(material, rng, place, [fact.line for fact in facts], asked)


def variables(material: Material, rng: np.random.Generator, place: Place) -> Trial:
    """Two chains of assignments (x1 = x0, x2 = x1, ...); one is walked back, variable by variable, to its value."""
    names, values = material.names(rng, 2 * HOPS), material.values(rng, 2)
    chains = []
    for number in range(2):
        chain = names[number * HOPS : (number + 1) * HOPS]
        chains.append(
            [material.fact(name, value) for name, value in zip(chain, [values[number], *chain], strict=False)]
        )
    lines = [fact.line for chain in chains for fact in chain]
    return _scored(material, rng, place, [lines[int(i)] for i in rng.permutation(len(lines))], chains[0][::-1])


def copying(material: Material, rng: np.random.Generator, place: Place) -> Trial:
    """A block of text that comes again after the context."""
    block = material.filler(rng, COPIED).ids + material.tokens("\n")
    tail = [(block[:CUE], block[CUE:COPIED])]
    return _with_tail(material, rng, place, [block], tail)


def continuing(material: Material, rng: np.random.Generator, place: Place) -> Trial:
    """Unseen text that goes on after the context."""
    whole = (place.length - CONTINUED) // place.chunk * place.chunk
    _check_room(place, whole - len(material.opening))
    ids = material.opening + material.filler(rng, whole + CONTINUED - len(material.opening)).ids
    return Trial(ids, 1, spans=((whole + 1, len(ids)),))  # the first prediction was made before the pruning


def agreement(material: Material, rng: np.random.Generator, place: Place) -> Trial:
    """Free continuation, to be compared with what the unpruned model writes."""
    _check_room(place, place.length - len(material.opening))
    return Trial(material.opening + material.filler(rng, place.length - len(material.opening)).ids, GENERATED)


def arithmetic(material: Material, rng: np.random.Generator, place: Place) -> Trial:
    """Sums all over the context, and another one to be done."""
    facts: dict[str, Fact] = {}
    while len(facts) < SUMS + 1:  # of different results: copying one cannot be right
        first, second = (int(number) for number in rng.integers(2, 50, size=2))
        facts[str(first + second)] = material.sum_fact(first, second)
    *shown, asked = facts.values()
    return _generated(material, rng, place, [fact.line for fact in shown], asked.head, asked)


def _generated(
    material: Material, rng: np.random.Generator, place: Place, lines: list[list[int]], question: list[int], asked: Fact
) -> Trial:
    """Lines at random depths, a single one at the depth of the trial's number; then the question."""
    depths = [DEPTHS[place.index % len(DEPTHS)]] if len(lines) == 1 else rng.random(len(lines)).tolist()
    question = material.tokens("\n") + question
    room = place.length - sum(map(len, [material.opening, question, *lines]))
    _check_room(place, room)
    context = material.filler(rng, room).insert(list(zip(depths, lines, strict=True)))
    return Trial(material.opening + context + question, len(asked.answer) + 2, answer=asked.value)


def _scored(
    material: Material, rng: np.random.Generator, place: Place, lines: list[list[int]], asked: Sequence[Fact]
) -> Trial:
    """Lines at random depths of the context, the facts asked for in the tail."""
    ends = [[], *(fact.end for fact in asked)]
    tail = [(end + fact.head, fact.answer) for end, fact in zip(ends, asked, strict=False)]
    return _with_tail(material, rng, place, lines, tail)


def _with_tail(
    material: Material,
    rng: np.random.Generator,
    place: Place,
    lines: list[list[int]],
    tail: Sequence[tuple[list[int], list[int]]],
) -> Trial:
    """A context of whole chunks, then the tail: pairs of tokens that are given and tokens that are scored."""
    ids = material.tokens("\n")
    spans = []
    for given, scored in tail:
        ids += given
        spans.append((len(ids), len(ids) + len(scored)))
        ids += scored
    whole = (place.length - len(ids)) // place.chunk * place.chunk
    room = whole - sum(map(len, [material.opening, *lines]))
    _check_room(place, room)
    depths = rng.random(len(lines)).tolist()
    context = material.filler(rng, room).insert(list(zip(depths, lines, strict=True)))
    shifted = tuple((whole + start, whole + end) for start, end in spans)
    return Trial(material.opening + context + ids, 1, spans=shifted)


def _check_room(place: Place, room: int) -> None:
    if room < 1:
        raise InvalidRequestError(
            f"{place.length:,} tokens are too few for this task with prompt chunks of {place.chunk:,}"
        )


TASKS: dict[str, Task] = {
    "needle": Task(needle, {"needle": answered}),
    "multi-key": Task(multi_key, {"multi-key": answered}),
    "multi-query": Task(multi_query, {"multi-query": recalled}, tail=True),
    "variables": Task(variables, {"variables": recalled_all}, tail=True),
    "copying": Task(copying, {"copying": copied}, tail=True),
    "loss": Task(continuing, {"loss": log_loss}, tail=True),
    "agreement": Task(agreement, {"agreement": agreeing, "agreement from start": agreeing_from_start}),
    "arithmetic": Task(arithmetic, {"arithmetic": answered}),
}
LOSSES = frozenset({"loss"})
"""Measures in nats per token, where less is better; all others are shares."""
