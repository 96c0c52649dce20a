"""The n-gram drafter against a brute-force search of the longest match."""

import random

import numpy as np
import pytest

from quire.kernels.cpu_library import cpu_library
from quire.speculation import ngram
from quire.speculation.history import TokenHistory
from quire.speculation.ngram import SHORTEST, GramIndex, NgramDrafter

from .world import NeverDraw, World, lists


class Index:
    """An index of one sequence, in the second of two slots."""

    def __init__(self, max_length: int) -> None:
        self.history, self.index = TokenHistory(2, max_length), GramIndex(2, max_length)

    def continuation(self, tokens: list[int], most: int) -> list[int]:
        self.history.extend(1, tuple(tokens[self.history.known[1] :]))
        self.index.extend(self.history, np.array([1], np.int32))
        return list(self.index.continuation(self.history, 1, most))


def brute_force(tokens: list[int], most: int) -> list[int]:
    """The continuation of the longest, among equals newest, earlier occurrence of the last tokens."""
    best, start, last = 0, 0, len(tokens) - 1
    for end in range(last - 1, -1, -1):
        length = 0
        while length <= end and tokens[end - length] == tokens[last - length]:
            length += 1
        if min(length, ngram._ENOUGH) > best:
            best, start = min(length, ngram._ENOUGH), end + 1
    if best < SHORTEST:
        return []
    longer = list(tokens)
    for _ in range(min(best, most)):
        longer.append(longer[start + len(longer) - len(tokens)])
    return longer[len(tokens) :]


@pytest.fixture
def exhaustive(monkeypatch):
    """Every candidate is compared, as brute force does."""
    monkeypatch.setattr(ngram, "_CANDIDATES", 10**6)


@pytest.mark.parametrize("vocab", [2, 4, 30])
@pytest.mark.parametrize("few", [5, 20, 1000])
def test_finds_what_brute_force_finds(exhaustive, monkeypatch, vocab, few):
    """Whether tokens come one by one, by the handful, or in pieces that are indexed at once."""
    monkeypatch.setattr(ngram, "_FEW", few)
    draw = random.Random(vocab)
    index, proposed = Index(600), 0
    tokens: list[int] = []
    while len(tokens) < 400:
        tokens += [draw.randrange(vocab) for _ in range(draw.choice([1, 1, 1, 2, 7, 40]))]
        got = index.continuation(tokens, 9)
        assert got == brute_force(tokens, 9)
        proposed += len(got)
    assert proposed


def test_few_candidates_still_give_a_real_match():
    """The bound on candidates may cost length, never truth: the match ends with the newest tokens."""
    draw = random.Random(0)
    tokens = [draw.randrange(3) for _ in range(500)]
    index = Index(500)
    for end in range(10, 500, 7):
        got = index.continuation(tokens[:end], 8)
        suffix = tokens[end - SHORTEST : end]
        found = [i for i in range(end - SHORTEST) if tokens[i : i + SHORTEST] == suffix]
        assert bool(got) == bool(found)
        period = [*tokens[:end], *got]
        assert not got or any(period[i + SHORTEST : i + SHORTEST + len(got)] == got for i in found)


def test_a_run_is_continued_past_its_own_end():
    assert Index(50).continuation([9, 1, 2, 1, 2, 1, 2], 4) == [1, 2, 1, 2]


def test_nothing_known_nothing_proposed():
    for tokens in ([], [5], [5, 5], [5, 6, 7], [5, 6, 7, 6]):
        index = Index(50)
        assert not tokens or not index.continuation(tokens, 4)
        if tokens:
            assert index.index.matched(index.history, np.array([1], np.int32)).tolist() == [0]


def test_slots_are_apart_and_forgotten_when_they_change_hands():
    drafter = NgramDrafter(3, 100)
    world = World(drafter, 3, 100, 50)
    world.enter(0, [1, 2, 3, 4, 1, 2])
    world.enter(2, [1, 2, 9, 9, 7, 1, 2])
    slots, most = np.array([2, 0], np.int32), np.array([4, 1], np.int32)
    assert lists(drafter.propose(world.history, slots, most, NeverDraw()), most) == [[9, 9], [3]]
    world.history.extend(0, (3, 4))
    assert world.propose([0], [4]) == [[1, 2, 3, 4]]
    world.enter(0, [8, 3, 4, 1, 2])
    assert world.propose([0], [4]) == [[]]
    assert drafter.num_bytes > 0
    drafter.clear()
    assert drafter.num_bytes == 0
    assert world.propose([2], [4]) == [[9, 9]]


@pytest.mark.parametrize("vocab", [3, 30])
def test_what_is_foreseen_is_proposed(exhaustive, monkeypatch, vocab):
    """For a few slots exactly, for many at least; tokens that come to many slots together are indexed as one by one."""
    slots = np.arange(40, dtype=np.int32)
    history = TokenHistory(len(slots), 300)
    few, many = (NgramDrafter(len(slots), 300) for _ in range(2))
    draw, most = random.Random(vocab), np.full(len(slots), 16, np.int32)
    exact = total = 0
    for _ in range(25):
        for slot in slots.tolist():
            history.extend(slot, tuple(draw.randrange(vocab) for _ in range(draw.choice([1, 1, 2, 9]))))
        proposed = few.propose(history, slots, most, NeverDraw())
        for part in np.split(slots, 5):
            assert (few.foresee(history, part) == proposed.counts[part]).all()
        foreseen = many.foresee(history, slots)
        assert ((foreseen > 0) == (proposed.counts > 0)).all() and (foreseen <= proposed.counts).all()
        again = many.propose(history, slots, most, NeverDraw())
        assert (again.tokens == proposed.tokens).all()
        exact, total = exact + int((foreseen == proposed.counts).sum()), total + len(slots)
    assert exact > 0.5 * total


@pytest.mark.skipif(cpu_library() is None, reason="needs the C++ kernels")
@pytest.mark.parametrize(("vocab", "shortest"), [(2, 2), (3, 4), (30, 2)])
def test_compiled_look_ups_are_those_of_python(monkeypatch: pytest.MonkeyPatch, vocab: int, shortest: int) -> None:
    """And leave the same index, which either goes on with."""
    monkeypatch.setattr(ngram, "_FEW", 10**6)  # what is added together leaves more in it, which nobody believes
    library = cpu_library()
    history = TokenHistory(9, 400)
    plain, compiled = NgramDrafter(9, 400, shortest), NgramDrafter(9, 400, shortest, library)
    draw, slots, found = random.Random(vocab), np.arange(1, 9, dtype=np.int32), 0
    for step in range(120):
        for slot in slots.tolist():
            if draw.random() < 0.03:
                history.known[slot] = 0
                plain.assign(slot)
                compiled.assign(slot)
            history.extend(slot, tuple(draw.randrange(vocab) for _ in range(draw.choice([0, 1, 1, 2, 9]))))
        part = draw.sample(slots.tolist(), draw.randint(1, 8))
        asked = np.array([slot for slot in part if history.known[slot]], np.int32)
        if step % 5 == 4:
            most = np.full(len(asked), 16, np.int32)
            pair = [drafter.propose(history, asked, most, NeverDraw()) for drafter in (plain, compiled)]
            assert lists(pair[0], most) == lists(pair[1], most)
        foreseen = compiled.foresee(history, asked)
        assert foreseen.tolist() == plain.foresee(history, asked).tolist()
        found += int(np.count_nonzero(foreseen))
        for name in ("_newest", "_older", "_size", "_used"):
            assert (getattr(plain._index, name) == getattr(compiled._index, name)).all()
    assert found > 20
    compiled.clear()
    assert compiled.num_bytes == 0 and compiled.foresee(history, asked).tolist() == foreseen.tolist()
