"""What a draft's cache has of one sequence serves others: the same proposals, for fewer tokens computed.

The comparison is with namespaces that keep everybody apart.
"""

import random
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from torch import Tensor

from quire.core.speculation import CaughtUp
from quire.speculation import draft_cache
from quire.speculation import model as drafting
from quire.speculation.hybrid import HybridDrafter
from quire.speculation.model import ModelDrafter
from quire.speculation.ngram import NgramDrafter

from ..models.conftest import CPU, VOCAB
from .conftest import LENGTH, MODELS, PAGE, SLOTS, make_world
from .world import World, greedy

SHARED = tuple(range(3, 20))
"""Four blocks and a token."""


def propose(world: World[ModelDrafter], *slots: int, most: int = 2) -> tuple[list[list[int]], CaughtUp]:
    """Proposals and what it took; pages are where they should be before and after."""
    world.drafter.cache.check()
    said = world.propose(slots, [most] * len(slots))
    world.drafter.cache.check()
    return said, world.caught_up


def prefixes(dice: random.Random) -> list[int]:
    """One of few beginnings, and something of its own."""
    start = random.Random(dice.choice([1, 1, 1, 2])).choices(range(3, VOCAB), k=40)
    return [*start[: dice.choice([5, 8, 16, 24, 33, 40])], *dice.choices(range(3, VOCAB), k=dice.randint(1, 6))]


def contents(world: World[ModelDrafter]) -> dict[bytes, Tensor]:
    """Entries of all blocks that anybody may find."""
    cache = world.drafter.cache
    heads, found = cache._heads, {}
    for block in cache.index:
        assert block.pages is not None
        first = int(block.pages[0]) * heads
        found[block.digest] = cache.pool[first : first + heads].clone()
    return found


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("capacity", [SLOTS * LENGTH, 18 * PAGE])
def test_proposals_with_shared_blocks_equal_those_without(drafts, name, backend, capacity, monkeypatch):
    """Random conversations, of which two worlds are told the same: in one all may share, and pages may be short."""
    monkeypatch.setattr(drafting, "CATCH_UP_TOKENS", 24)
    made, dice = drafts(name), random.Random(f"{name} {capacity}")
    place = replace(CPU, backend=backend)
    shared, apart = make_world(made, capacity, place=place), make_world(made, place=place)
    shared.whole = apart.whole = False
    # Our own kernels compute a row alike whatever is beside it, torch's round differently.
    tolerance = 0.0 if backend == "cpu" and name != "library" else 1e-5
    cached = computed = alone = compared = 0
    names = count()
    stable: dict[bytes, Tensor] = {}

    def enter(slot: int, tokens: list[int]) -> None:
        shared.enter(slot, tokens, dice.choice("aab"))
        apart.enter(slot, tokens, next(names))

    for slot in range(SLOTS):
        enter(slot, prefixes(dice))
    for _ in range(40):
        slots = dice.sample(range(SLOTS), dice.randint(1, SLOTS))
        most = [dice.randint(1, 5) for _ in slots]
        said, logits, took = shared.propose(slots, most), shared.logits, shared.caught_up
        wanted, expected = apart.propose(slots, most), apart.logits
        cached, computed, alone = cached + took.cached, computed + took.computed, alone + apart.caught_up.computed
        shared.drafter.cache.check()
        now = contents(shared)
        assert all(torch.equal(now[digest], stable[digest]) for digest in now.keys() & stable.keys())
        stable = now
        for row, (slot, one, two) in enumerate(zip(slots, said, wanted, strict=True)):
            if one and two:
                assert one == two
                compared += 1
                for depth in range(len(one)):
                    pair = logits[row, depth], expected[row, depth]
                    torch.testing.assert_close(*pair, rtol=tolerance, atol=tolerance)
            new = [*two[: dice.randint(0, len(two))], *dice.choices(range(3, VOCAB), k=dice.choice([1, 1, 3]))]
            for world in (shared, apart):
                world.history.extend(slot, tuple(new))
        for slot in slots:
            tokens = shared.tokens(slot)
            if len(tokens) > LENGTH - 12:
                enter(slot, prefixes(dice))
            elif dice.random() < 0.2:  # the next turn, perhaps in another slot, or somebody else
                enter(dice.randrange(SLOTS), dice.choice([[*tokens, 5], prefixes(dice)]))
    assert apart.caught_up.cached == 0
    assert compared > 25 and cached > 60 and (capacity < SLOTS * LENGTH or computed < 0.8 * alone)


def test_the_next_turn_computes_what_is_new(drafts):
    world = make_world(drafts("native"))
    world.enter(0, SHARED)
    (first,), took = propose(world, 0, most=4)
    assert took == CaughtUp(cached=0, computed=17)
    world.history.extend(0, (*first[:3], 30))  # 21 tokens; the drafts that were right have entries
    _, took = propose(world, 0)
    assert took == CaughtUp(cached=0, computed=1)
    world.enter(3, [*world.tokens(0), 31, 32])
    assert world.drafter.recall(world.history, np.array([3, 0], np.int32)).tolist() == [20, 0]
    (said,), took = propose(world, 3)
    assert took == CaughtUp(cached=20, computed=3)
    assert said == greedy(drafts("native").model, world.tokens(3), 2)
    world.enter(3, SHARED[:16])  # the newest token is computed, so its block is not taken
    assert propose(world, 3)[1] == CaughtUp(cached=12, computed=4)


def test_a_slot_of_its_own_comes_back_to_its_tokens(drafts):
    """Preempted and let in again, or having lost its pages to others."""
    world = make_world(drafts("native"))
    world.enter(0, SHARED)
    propose(world, 0)
    world.enter(0, [*SHARED, 40, 41])
    assert propose(world, 0)[1] == CaughtUp(cached=16, computed=3)


def test_choices_of_a_prompt_compute_it_once(drafts):
    made = drafts("native")
    world = make_world(made)
    for slot in range(SLOTS):
        world.enter(slot, [*SHARED, 40 + slot])
    said, took = propose(world, *range(SLOTS))
    assert [len(one) for one in said] == [2, 0, 0, 0] and took == CaughtUp(cached=0, computed=18)
    said, took = propose(world, 1, 2, 3)
    assert said == [greedy(made.model, world.tokens(slot), 2) for slot in (1, 2, 3)]
    assert took == CaughtUp(cached=48, computed=6)


def test_who_shares_little_waits_for_nobody(drafts):
    world = make_world(drafts("native"))
    for slot in range(SLOTS):
        world.enter(slot, [*SHARED[:8], *range(30 + 9 * slot, 39 + 9 * slot)])
    said, took = propose(world, *range(SLOTS))
    assert [len(one) for one in said] == [2] * SLOTS and took == CaughtUp(cached=0, computed=SLOTS * 17)


def test_a_prompt_longer_than_a_step_is_shared_while_it_is_computed(drafts, monkeypatch):
    monkeypatch.setattr(drafting, "CATCH_UP_TOKENS", 16)
    world = make_world(drafts("native"))
    for slot in (0, 1):
        world.enter(slot, range(3, 3 + 41))
    computed = 0
    for _ in range(5):
        said, took = propose(world, 0, 1)
        computed += took.computed
        if all(said):
            break
    assert all(said) and computed <= 41 + 5


def test_namespaces_do_not_share(drafts):
    world = make_world(drafts("native"))
    world.enter(0, SHARED, "one")
    world.enter(1, SHARED, "other")
    assert propose(world, 0, 1)[1] == CaughtUp(cached=0, computed=34)
    world.enter(2, SHARED, "third")
    assert world.drafter.recall(world.history, np.array([2], np.int32)).tolist() == [0]
    assert propose(world, 2)[1] == CaughtUp(cached=0, computed=17)
    world.enter(2, SHARED, "other")
    assert propose(world, 2)[1] == CaughtUp(cached=16, computed=1)


def test_the_newest_token_may_be_computed_twice_and_no_block_is_written(drafts):
    """Asked again with no token more, at the end of a block."""
    world = make_world(drafts("native"))
    world.enter(0, SHARED[:16])
    propose(world, 0)
    before = contents(world)
    assert len(before) == 3
    propose(world, 0)
    assert all(torch.equal(block, before[digest]) for digest, block in contents(world).items())


def test_blocks_nobody_uses_go_first_and_the_oldest_of_them(drafts):
    made = drafts("native")
    world = make_world(made, capacity=12 * PAGE)
    cache = world.drafter.cache
    for start in (3, 30):
        world.enter(0, range(start, start + 17))
        propose(world, 0)
    world.enter(0, [80, 81])
    world.enter(1, [50, 51, 52, 53, 54])
    propose(world, 0, 1)
    assert (len(cache.index), cache.num_free) == (9, 1)
    world.enter(2, range(60, 72))  # four bundles
    propose(world, 2)
    assert cache.held.tolist() == [1, 2, 4, 0]
    found = {tuple(range(start, start + 17)): 0 for start in (3, 30)}
    for tokens in found:
        world.enter(3, tokens)
        found[tokens] = int(world.drafter.recall(world.history, np.array([3], np.int32))[0])
    assert [*found.values()] == [4, 16]  # of the older prefix the deepest blocks


def test_a_beginning_is_given_back_where_the_rest_finds_no_pages(drafts):
    """Those named first have pages first, and blocks that were found for a later one are no reason to go without."""
    made = drafts("native")
    world = make_world(made, capacity=10 * PAGE)
    world.enter(0, range(3, 28))
    propose(world, 0)
    world.enter(0, range(60, 90))  # six blocks are idle now, four bundles free; this one needs eight
    world.enter(1, [*range(3, 28), *range(30, 58)])  # eight more than the six
    said, took = propose(world, 0, 1)
    # The first in line lacks 29 tokens and the other 30, so both cannot be: one drafts, with what the other had found.
    assert sorted(map(len, said)) == [0, 2] and took.computed < 33
    world.drafter.cache.check()


def test_drafts_of_a_slot_that_lost_its_pages_are_void(drafts):
    """They happen to be how its prompt begins."""
    made = drafts("native")
    world = make_world(made, capacity=8 * PAGE)
    dice = random.Random(1)
    for _ in range(200):
        prompt = dice.choices(range(3, VOCAB), k=6)
        prompt[0] = greedy(made.model, prompt, 1)[0]
        if greedy(made.model, prompt, 1)[0] == prompt[0]:
            break
    world.enter(0, prompt)
    ((first, second),) = world.propose([0], [2])
    assert first == prompt[0]
    world.enter(1, range(60, 90))
    propose(world, 1)
    assert world.drafter.cache.held[0] == 0
    said, took = propose(world, 0)
    assert took == CaughtUp(cached=0, computed=6) and said == [[first, second]]


def test_an_ended_slot_gives_its_blocks_to_whom_finds_them(drafts, monkeypatch):
    """The older prefix goes first, although its slot never had another sequence."""
    monkeypatch.setattr(draft_cache, "_RESTING", 3)
    world = make_world(drafts("native"), capacity=12 * PAGE)
    cache = world.drafter.cache
    for slot, start in ((3, 30), (0, 3)):
        world.enter(slot, range(start, start + 17))
        propose(world, slot)
    for _ in range(4):
        propose(world, 0)
    assert cache.held.tolist() == [5, 0, 0, 0] and len(cache.index) == 8
    world.enter(0, [*range(50, 80)])
    propose(world, 0)
    for tokens, found in ((range(30, 47), 0), (range(3, 20), 16)):
        world.enter(3, tokens)
        assert world.drafter.recall(world.history, np.array([3], np.int32)).tolist() == [found]


def test_all_is_forgotten_with_the_model_and_on_clear(drafts):
    first, second = drafts("native"), drafts("window")
    world = make_world(first)
    every = world.drafter.cache.num_free
    world.enter(0, SHARED)
    propose(world, 0)
    world.drafter.replace(second.load())
    world.enter(1, SHARED)
    (said,), took = propose(world, 1)
    assert took == CaughtUp(cached=0, computed=17) and said == greedy(second.model, SHARED, 2)
    world.drafter.clear()
    assert world.drafter.cache.num_free == every and not len(world.drafter.cache.index)
    world.enter(1, SHARED)
    assert propose(world, 1)[1] == CaughtUp(cached=0, computed=17)


def test_a_pair_remembers_what_its_model_does(drafts):
    world = make_world(drafts("native"))
    pair = World(HybridDrafter(NgramDrafter(SLOTS, LENGTH, 4), world.drafter), SLOTS, LENGTH, VOCAB)
    pair.enter(0, SHARED)
    pair.propose([0], [2])
    assert pair.caught_up == CaughtUp(cached=0, computed=17)
    pair.enter(1, SHARED)
    assert pair.drafter.recall(pair.history, np.array([1], np.int32)).tolist() == [16]
    pair.propose([1], [2])
    assert pair.caught_up == CaughtUp(cached=16, computed=1)
