"""The model drafter against the library's own greedy text, whatever the target makes of the proposals."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quire.speculation import model as drafting

from ..kernels.triton_interpreter import ON_GPU
from ..models.conftest import CPU, SIZES, VOCAB
from .conftest import LENGTH, MODELS, PAGE, SLOTS, make_world
from .world import greedy


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", MODELS)
def test_proposals_are_the_drafts_own_greedy_text(drafts, name, backend):
    """Ragged batches, partly right proposals, tokens decoded without drafts, slots that change hands."""
    made, dice = drafts(name), random.Random(name)
    world = make_world(made, place=replace(CPU, backend=backend))
    for slot in range(SLOTS):
        world.enter(slot, [dice.randrange(3, VOCAB) for _ in range(dice.choice([1, 4, 9]))])
    checked = 0
    for _ in range(14):
        slots = dice.sample(range(SLOTS), dice.randint(1, SLOTS))
        most = [dice.randint(1, 5) for _ in slots]
        proposals = world.propose(slots, most)
        world.drafter.cache.check()
        for slot, limit, got in zip(slots, most, proposals, strict=True):
            assert got == greedy(made.model, world.tokens(slot), limit)
            checked += 1
            # The target keeps some of it, puts a token of its own behind, and now and then goes on alone.
            right = dice.randint(0, limit)
            world.history.extend(
                slot, (*got[:right], *(dice.randrange(3, VOCAB) for _ in range(dice.choice([1, 1, 3]))))
            )
            if len(world.tokens(slot)) > LENGTH - 12 or dice.random() < 0.1:
                world.enter(slot, [dice.randrange(3, VOCAB) for _ in range(dice.randint(1, 20))])
    assert checked > 20


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)] if ON_GPU else ["cpu"])
def test_triton_kernels_propose_the_same(drafts, device):
    made = drafts("native")
    world = make_world(made, place=replace(CPU, device=torch.device(device), backend="triton"))
    world.enter(0, [5, 6, 7])
    world.enter(1, [8, 9, 10, 11, 12])
    for most in ([1, 3], [2, 2]):
        proposals = world.propose([1, 0], most)
        assert proposals == [greedy(made.model, world.tokens(s), k) for s, k in zip([1, 0], most, strict=True)]
        world.history.extend(0, (*proposals[1], 20))
        world.history.extend(1, (21,))


def test_accepted_drafts_are_not_computed_again(drafts, monkeypatch):
    world = make_world(drafts("native"), place=replace(CPU, backend="reference"))
    world.enter(1, [5, 6, 7, 8, 9])
    fed: list[int] = []
    forward = world.drafter._runner.forward

    def counting(input_ids: Tensor, *rest: Any) -> Tensor:
        fed.append(len(input_ids))
        return forward(input_ids, *rest)

    monkeypatch.setattr(world.drafter._runner, "forward", counting)
    (first,) = world.propose([1], [4])
    world.history.extend(1, (*first, 11))  # all right: the last draft was never fed
    world.propose([1], [2])
    world.history.extend(1, (first[0] + 1,))  # wrong from the first on
    world.propose([1], [1])
    assert fed == [5, 1, 1, 1, 2, 1, 1]


def test_a_long_prompt_catches_up_over_steps_and_does_not_hold_up_others(drafts, monkeypatch):
    monkeypatch.setattr(drafting, "CATCH_UP_TOKENS", 8)
    made = drafts("native")
    world = make_world(made)
    world.enter(0, list(range(3, 30)))
    world.enter(1, [40, 41, 42])
    lengths = []
    for _ in range(6):
        long, short = world.propose([0, 1], [3, 3])
        lengths.append(len(long))
        assert short == greedy(made.model, world.tokens(1), 3)
        world.history.extend(1, (short[0] + 1,))
    # 3 of the first step's 8 tokens are the other's, then 1 each: 5 + 7 + 7 + 7 + 1.
    assert lengths == [0, 0, 0, 0, 3, 3]
    assert long == greedy(made.model, world.tokens(0), 3)


def test_short_of_pages_means_no_draft_and_idle_slots_give_way(drafts):
    made = drafts("native")
    world = make_world(made, capacity=8 * PAGE)
    world.enter(0, list(range(3, 19)))
    world.enter(1, list(range(20, 32)))
    assert [len(p) for p in world.propose([0], [2])] == [2]
    # 5 pages for the first; 4 for the second make 9 of 8: the one that lacks least has them, the other waits.
    assert [len(p) for p in world.propose([0, 1], [2, 2])] == [2, 0]
    world.drafter.cache.check()
    assert world.propose([1], [2]) == [greedy(made.model, world.tokens(1), 2)]
    assert world.drafter.cache.stored[0] == 0
    world.drafter.cache.check()
    assert world.propose([0], [2]) == [greedy(made.model, world.tokens(0), 2)]


def test_slots_and_all_pages_come_back(drafts):
    world = make_world(drafts("native"))
    every = world.drafter.cache.num_free
    for slot in range(SLOTS):
        world.enter(slot, [7, 8, 9, 10, 11])
    world.propose(range(SLOTS), [3] * SLOTS)
    assert world.drafter.cache.num_free < every
    world.drafter.assign(0)
    world.drafter.cache.check()
    world.drafter.clear()
    assert world.drafter.cache.num_free == every
    world.drafter.cache.check()


def test_nothing_is_proposed_past_the_context(drafts):
    made = drafts("native")
    world = make_world(made, length=100, capacity=400)
    limit = SIZES["max_position_embeddings"]
    tokens = np.random.default_rng(0).integers(3, VOCAB, limit + 2).tolist()
    for known, count in ((limit - 3, 3), (limit - 1, 1), (limit, 0), (limit + 2, 0)):
        world.enter(0, tokens[:known])
        (got,) = world.propose([0], [5])
        assert got == greedy(made.model, tokens[:known], count)


def test_another_model_forgets_what_the_first_stored(drafts):
    first, second = drafts("native"), drafts("window")
    world = make_world(first)
    world.enter(0, list(range(3, 12)))
    world.propose([0], [3])
    world.drafter.replace(second.load())
    assert world.propose([0], [3]) == [greedy(second.model, world.tokens(0), 3)]
    world.drafter.cache.check()
