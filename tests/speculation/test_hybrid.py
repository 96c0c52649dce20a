"""The drafter of two against its parts: whose proposal it is, and that either is exactly what that part proposes."""

import random

import pytest

from quire.speculation.draft_cache import DraftLayout
from quire.speculation.hybrid import HybridDrafter
from quire.speculation.model import ModelDrafter
from quire.speculation.ngram import NgramDrafter

from ..models.conftest import CPU, VOCAB, Tiny, make_checkpoint
from .world import World, greedy

SLOTS, LENGTH, MATCH = 3, 80, 4
REPEATED = [7, 8, 9, 10, 11, 12, 13, 7, 8, 9, 10]
"""Ends with a match of four tokens."""


@pytest.fixture(scope="module")
def draft(tmp_path_factory) -> Tiny:
    return make_checkpoint(tmp_path_factory.mktemp("draft"), "llama", {"num_key_value_heads": 2})


def make_world(draft: Tiny) -> World[HybridDrafter]:
    runner = draft.load()
    model = ModelDrafter(runner, DraftLayout(SLOTS, LENGTH, 4, SLOTS * LENGTH), CPU, runner)
    return World(HybridDrafter(NgramDrafter(SLOTS, LENGTH, MATCH), model), SLOTS, LENGTH, VOCAB)


def test_long_matches_are_believed_and_the_model_otherwise(draft):
    world = make_world(draft)
    texts = [[20, 21, 22, 23], REPEATED, [30, 31, 40, 30, 31]]  # the last match is too short
    for slot, text in enumerate(texts):
        world.enter(slot, text)
    got = world.propose([2, 1, 0], [3, 4, 12])
    own = [greedy(draft.model, texts[slot], count) for slot, count in ((2, 3), (0, 12))]
    assert got == [own[0], [11, 12, 13, 7], own[1]]


def test_the_model_has_limits_of_its_own(draft):
    world = make_world(draft)
    texts = [[20, 21, 22, 23], REPEATED, [30, 31, 40, 30, 31]]
    for slot, text in enumerate(texts):
        world.enter(slot, text)
    got = world.propose([2, 1, 0], [4, 4, 4], drawn=[0, 0, 2])
    assert got == [[], [11, 12, 13, 7], greedy(draft.model, texts[0], 2)]


def test_the_model_catches_up_with_what_n_grams_brought(draft):
    world, dice = make_world(draft), random.Random(1)
    for slot in range(SLOTS):
        world.enter(slot, REPEATED[: 9 + slot])
    by_model = by_ngrams = 0
    for _ in range(12):
        slots = dice.sample(range(SLOTS), 2)
        alone = World(NgramDrafter(SLOTS, LENGTH, MATCH), SLOTS, LENGTH, VOCAB)
        for slot, got in zip(slots, world.propose(slots, [3, 3]), strict=True):
            alone.enter(slot, world.tokens(slot))
            (match,) = alone.propose([slot], [3])
            assert got == (match or greedy(draft.model, world.tokens(slot), 3))
            by_ngrams, by_model = by_ngrams + bool(match), by_model + (not match)
            # Part of it is right; then the target says something else, or repeats itself.
            said = dice.choice([[dice.randrange(3, VOCAB)], REPEATED[:5]])
            world.history.extend(slot, (*got[: dice.randint(0, 2)], *said))
    assert by_model > 5 and by_ngrams > 5


def test_another_sequence_in_a_slot_has_nothing_of_the_last_one(draft):
    world = make_world(draft)
    world.enter(0, REPEATED)
    world.propose([0], [4])
    for text in ([7, 8, 9, 10], REPEATED[:9]):
        world.enter(0, text)
        assert world.propose([0], [4]) == [greedy(draft.model, text, 4)]
        world.drafter.clear()
