"""Chains drawn by a kernel in one call: the tokens, and what they were drawn from, of draws made one by one."""

from typing import Any

import numpy as np
import pytest
import torch

from quire.core.ids import SlotId
from quire.core.plan import SlotAssignment
from quire.core.request import SamplingParams
from quire.engine.proposal_draw import ProposalDraw
from quire.engine.sampler import Sampler
from quire.kernels.draft_chain_cpu import DrawRules
from quire.models.runner import ModelRunner

from ..kernels.test_draft_chain import DEPTH, MOST, SLOTS, run
from ..models.conftest import CPU, VOCAB, make_checkpoint

FIRST = np.array([10, 4, 1, 7, 2], np.int32)
FREE: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_k": 20},
    {"top_p": 0.6},
    {"min_p": 0.3},
    {"top_k": 9, "top_p": 0.9},
]
GREEDY: dict[str, Any] = {"temperature": 0.0}
BATCHES = {
    "free": FREE,
    "seeded": [kind | {"seed": 5} for kind in FREE],
    "greedy": [GREEDY, GREEDY, GREEDY, GREEDY, {"top_k": 1, "temperature": 9.0}],
    "mixed": [{}, GREEDY, {"seed": 3}, {"top_p": 0.7, "temperature": 1e-60}, {"top_k": 7}],
}


class OneByOne(ProposalDraw):
    """Has to be called for every token."""

    def rules(self, *_: object) -> DrawRules | None:
        return None


def make_draw(kind: type[ProposalDraw], batch: list[dict[str, Any]]) -> ProposalDraw:
    sampler = Sampler(SLOTS + 1, VOCAB, torch.device("cpu"), CPU.backend)
    slots = np.arange(1, SLOTS + 1, dtype=np.int32)
    for slot, params in zip(slots.tolist(), batch, strict=True):
        sampler.table.assign(SlotAssignment(SlotId(slot), SamplingParams(**params), 7 * slot, (), (1,), (), 99))
    return ProposalDraw(sampler, slots, FIRST, DEPTH, MOST)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    return make_checkpoint(tmp_path_factory.mktemp("draft"), "llama", {"num_key_value_heads": 2}).load()


@pytest.mark.parametrize("batch", BATCHES)
@torch.inference_mode()
def test_one_call_draws_what_single_draws_do(runner: ModelRunner, batch: str) -> None:
    together, apart = (make_draw(kind, BATCHES[batch]) for kind in (ProposalDraw, OneByOne))
    (tokens, state), (expected, wanted) = (run(runner, CPU, draw) for draw in (together, apart))
    assert torch.equal(tokens, expected)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(state[:2], wanted[:2], strict=True))
    chains = np.ones(SLOTS, np.bool_)
    kept, kept_apart = together.drawn_from(chains), apart.drawn_from(chains)
    if kept is None or kept_apart is None:
        assert kept is kept_apart and batch in ("greedy", "seeded")
        return
    free = [member for member, params in enumerate(BATCHES[batch]) if params != GREEDY and "seed" not in params]
    (places, scaled), (places_apart, scaled_apart) = kept, kept_apart
    drawn = places >= 0
    assert {row: int(count) for row, count in enumerate(drawn.sum(1)) if count} == {i: MOST[i] for i in free}
    assert len(scaled) == MOST[free].sum(), "no memory for what nobody looks at"
    assert np.array_equal(drawn, places_apart >= 0)
    assert torch.equal(scaled[places[drawn]], scaled_apart[places_apart[drawn]])


@torch.inference_mode()
def test_who_asks_for_more_than_cuts_is_drawn_one_by_one() -> None:
    active = (MOST[:, None] > np.arange(DEPTH)).sum(0).tolist()
    for params in ({"frequency_penalty": 0.5}, {"logit_bias": {3: 1.0}}, {"min_tokens": 20}):
        draw = make_draw(ProposalDraw, [*FREE[:-1], params])
        assert draw.rules(np.arange(SLOTS, dtype=np.int32), active) is None
        assert draw.drawn_from(np.ones(SLOTS, np.bool_)) is None
    draw = make_draw(ProposalDraw, [*FREE[:-1], {"min_tokens": 1}])
    assert draw.rules(np.arange(SLOTS, dtype=np.int32), active) is not None, "it has them already"
