"""Acceptance found offline is what drafting and verifying would give."""

import numpy as np
import pytest
import torch
from torch import Tensor

from quire.distill.acceptance import Tally, chain_tally, greedy_matches, sampled_tally
from quire.distill.held_out import ALL, HeldText, choose, measure
from quire.distill.prompts import Example

CPU = torch.device("cpu")
VOCAB = 30
GENERATOR = torch.Generator().manual_seed(1)
TARGET = torch.randn(VOCAB, VOCAB, generator=GENERATOR)
DRAFT = TARGET + 0.7 * torch.randn(VOCAB, VOCAB, generator=GENERATOR)


def target(ids: Tensor) -> Tensor:
    """A bigram model."""
    return TARGET[ids]


def draft(ids: Tensor) -> Tensor:
    return DRAFT[ids]


def greedy(table: Tensor, token: int, count: int) -> list[int]:
    found: list[int] = []
    for _ in range(count):
        token = int(table[token].argmax())
        found.append(token)
    return found


def test_chains_are_those_of_drafting_and_verifying() -> None:
    most = 3
    table = TARGET + 0.02 * torch.randn(VOCAB, VOCAB)
    for start in range(VOCAB):
        output = greedy(table, start, 40)
        taken, steps, place = 0, 0, 0
        while place + most < len(output):
            proposal = greedy(DRAFT, [start, *output][place], most)
            run = 0
            while run < most and proposal[run] == output[place + run]:
                run += 1
            taken, steps, place = taken + run, steps + 1, place + run + 1
        tally = chain_tally(greedy_matches(draft, [start], output, CPU), most)
        assert (sum(tally.taken), tally.steps) == (taken, steps)


def test_positions_are_counted_as_far_as_they_were_tried() -> None:
    tally = chain_tally(np.array([1, 1, 0, 1, 0, 0, 1, 1, 1, 1], bool), 2)
    # steps at 0 (both), 3 (the first of two), 5 (none), 6 (both)
    assert (tally.steps, tally.tried, tally.taken) == (4, [4, 3], [3, 2])
    assert tally.accepted_length == 5 / 4 and tally.by_position == [3 / 4, 2 / 3]
    tally += Tally(steps=1, tried=[1, 0], taken=[0, 0], positions=2, agreed=1)
    assert tally.accepted_length == 1.0 and tally.agreement == 0.5
    assert chain_tally(np.ones(2, bool), 2).steps == 0


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_overlap_is_that_of_whole_rows(temperature: float) -> None:
    ids = [3, 9, 4, 4, 20]
    tally = sampled_tally(target, draft, ids, temperature, CPU)
    p, q = ((table[ids].double() / temperature).softmax(1) for table in (TARGET, DRAFT))
    assert tally.acceptance == pytest.approx(torch.minimum(p, q).sum(1).mean().item(), abs=1e-5)
    agreed = (TARGET[ids].argmax(1) == DRAFT[ids].argmax(1)).double().mean().item()
    assert tally.agreement == agreed


def test_domains_and_their_sum() -> None:
    texts = [HeldText("a", [1, 2], [3, 4], greedy(TARGET, 2, 20)), HeldText("b", [5], [6], greedy(TARGET, 5, 20))]
    found = measure(texts, target, target, most=4, temperature=1.0, device=CPU)
    assert list(found.acceptance) == [ALL, "a", "b"]
    assert found.acceptance[ALL] == pytest.approx(1.0, abs=1e-5) and found.accepted_length[ALL] == 4.0
    other = measure(texts, target, draft, most=4, temperature=1.0, device=CPU)
    weighted = (4 * other.acceptance["a"] + 2 * other.acceptance["b"]) / 6
    assert other.acceptance[ALL] == pytest.approx(weighted)


def test_domains_are_chosen_in_turn() -> None:
    examples = [Example((n,), domain="ab"[n > 3]) for n in range(6)]
    assert [example.prompt[0] for example in choose(examples, 5)] == [0, 4, 1, 5, 2]
