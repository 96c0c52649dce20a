"""Per-slot sampling: each row by its own parameters, whatever else is in the batch."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from quire.core.ids import SlotId
from quire.core.plan import NON_FINITE, BatchPlan, Decodes, IntArray, SequenceOutput, SequencePlan, SlotAssignment
from quire.core.request import SamplingParams
from quire.engine.inputs import logit_layout
from quire.engine.sampler import Sampler
from quire.engine.slots import draw_kind, signed64

VOCAB = 12
STOP = (0, 5)


def assign(
    sampler: Sampler, slot: int, params: SamplingParams, seed: int = 1, prompt: tuple[int, ...] = (1, 2), **more: Any
) -> None:
    sampler.table.assign(SlotAssignment(SlotId(slot), params, seed, STOP, prompt, more.get("output", ()), 100))


def draw(sampler: Sampler, slots: list[int], logits: torch.Tensor, start: int = 10) -> list[int]:
    """One token per slot, of which every other is a steady decode; the new token's position is start + 1."""
    steady, others = slots[::2], slots[1::2]
    columns = (np.array(column, np.int32) for column in (steady, [start] * len(steady), [3] * len(steady)))
    plan = BatchPlan(tuple(SequencePlan(SlotId(slot), start, (3,), True) for slot in others), decodes=Decodes(*columns))
    order = [*range(0, len(slots), 2), *range(1, len(slots), 2)]
    decoded, outputs = run(sampler, plan, logits[order])
    tokens = dict(zip(order, [*decoded.tolist(), *(output.token_ids[0] for output in outputs)], strict=True))
    return [tokens[place] for place in range(len(slots))]


def run(sampler: Sampler, plan: BatchPlan, logits: torch.Tensor) -> tuple[IntArray, tuple[SequenceOutput, ...]]:
    """Draw, fetch, and make outputs."""
    layout = logit_layout(plan)
    return sampler.outputs(plan, layout, logits, sampler.draw(plan, layout, logits))[:2]


def make_sampler(slots: int = 16) -> Sampler:
    return Sampler(slots, VOCAB, torch.device("cpu"))


MIXED = [
    SamplingParams(temperature=0.0),
    SamplingParams(),
    SamplingParams(temperature=0.7, top_k=4),
    SamplingParams(top_p=0.6, min_p=0.05),
    SamplingParams(min_p=0.3, logit_bias={3: 4.0, 7: -100.0}),
    SamplingParams(repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=-0.5),
    SamplingParams(temperature=0.0, min_tokens=5, repetition_penalty=0.5),
    SamplingParams(top_k=1, temperature=50.0),
]


def test_mixed_rows_are_drawn_as_if_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    together = make_sampler()
    for slot, params in enumerate(MIXED):
        assign(together, slot, params, seed=100 + slot)
    alone = make_sampler()
    for step in range(30):
        logits = torch.randn(len(MIXED), VOCAB, generator=generator) * 2
        order = torch.randperm(len(MIXED), generator=generator).tolist()
        drawn = draw(together, order, logits[order], start=1 + step)
        single = []
        for slot in order:
            if step == 0:
                assign(alone, slot, MIXED[slot], seed=100 + slot)
            single += draw(alone, [slot], logits[slot : slot + 1], start=1 + step)
        assert drawn == single


def test_the_given_logits_stay_as_they_are() -> None:
    sampler = make_sampler()
    for slot, params in enumerate(MIXED):
        assign(sampler, slot, params)
    logits = torch.randn(len(MIXED), VOCAB, generator=torch.Generator().manual_seed(2))
    before = logits.clone()
    draw(sampler, list(range(len(MIXED))), logits)
    assert torch.equal(logits, before)


def test_draws_of_one_sequence_follow_its_distribution() -> None:
    sampler = make_sampler()
    assign(sampler, 0, SamplingParams(temperature=0.8), seed=9)
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(4))
    drawn = torch.tensor([draw(sampler, [0], logits, start=i)[0] for i in range(3000)])
    expected = (logits[0] / 0.8).double().softmax(-1) * len(drawn)
    # A fixed seed: the p-value is always the same, and below this for one correct sampler in a thousand.
    assert stats.chisquare(torch.bincount(drawn, minlength=VOCAB), expected).pvalue > 1e-3


def test_stop_tokens_are_masked_until_min_tokens() -> None:
    sampler = make_sampler()
    assign(sampler, 0, SamplingParams(temperature=0.0, min_tokens=3), prompt=(1,) * 10)
    logits = torch.zeros(1, VOCAB)
    logits[0, 5], logits[0, 0], logits[0, 4] = 9.0, 8.0, 7.0
    drawn = [draw(sampler, [0], logits, start=start)[0] for start in range(9, 14)]
    assert drawn == [4, 4, 4, 5, 5]  # the tokens at positions 10, 11 and 12 are the first three


def test_penalties_count_what_was_generated_and_forget_the_last_owner() -> None:
    sampler = make_sampler()
    logits = torch.zeros(1, VOCAB)
    logits[0, :4] = torch.tensor([3.0, 2.9, 2.8, 2.7])
    greedy: dict[str, Any] = {"temperature": 0.0}
    assign(sampler, 0, SamplingParams(**greedy, frequency_penalty=0.16), prompt=(0, 0, 0))
    assert [draw(sampler, [0], logits)[0] for _ in range(6)] == [0, 1, 0, 2, 1, 3]
    assign(sampler, 0, SamplingParams(**greedy, presence_penalty=0.5), output=(0, 1))
    assert [draw(sampler, [0], logits)[0] for _ in range(3)] == [2, 3, 0]
    assign(sampler, 0, SamplingParams(**greedy, repetition_penalty=2.0), prompt=(0, 2))
    assert [draw(sampler, [0], logits)[0] for _ in range(3)] == [1, 3, 0]
    assign(sampler, 0, SamplingParams(**greedy))
    assert draw(sampler, [0], logits) == [0]


def test_rows_that_are_not_finite_fail_alone() -> None:
    sampler = make_sampler()
    for slot in range(3):
        assign(sampler, slot, SamplingParams(logprobs=1, prompt_logprobs=0))
    logits = torch.zeros(5, VOCAB)
    logits[2, 3] = float("nan")
    logits[4, 3] = float("inf")
    plan = BatchPlan(
        (
            SequencePlan(SlotId(0), 0, (1,), True),
            SequencePlan(SlotId(1), 0, (1, 2, 3), False, (2, 3)),
            SequencePlan(SlotId(2), 0, (1, 2), True, (2,)),
        )
    )
    decoded, outputs = run(sampler, plan, logits)
    assert not len(decoded)
    assert [output.error for output in outputs] == [None, NON_FINITE, NON_FINITE]
    assert len(outputs[0].logprobs) == 1 and outputs[0].logprobs[0].logprob == pytest.approx(-math.log(VOCAB))
    assert all(not (o.token_ids or o.logprobs or o.prompt_logprobs) for o in outputs[1:])


def test_logits_are_asked_only_where_needed() -> None:
    plan = BatchPlan(
        (
            SequencePlan(SlotId(0), 4, (1, 2, 3), False),
            SequencePlan(SlotId(1), 0, (1, 2, 3), True, (2, 3)),
            SequencePlan(SlotId(2), 9, (7,), True),
        ),
        decodes=Decodes(*(np.array(column, np.int32) for column in ([4, 3], [8, 9], [5, 6]))),
    )
    layout = logit_layout(plan)
    assert (layout.rows.tolist(), layout.sampled.tolist()) == ([0, 1, 5, 6, 7, 8], [0, 1, 4, 5])
    assert (layout.samplers, layout.sampler_rows, layout.scored) == ([1, 2], [4, 5], [(1, 2)])


def test_proposals_have_rows_of_their_own() -> None:
    plan = BatchPlan(
        (
            SequencePlan(SlotId(0), 4, (1, 2, 3), False),
            SequencePlan(SlotId(1), 5, (1, 2, 3), True, drafts=2),
            SequencePlan(SlotId(2), 9, (7, 8), True, (8,), drafts=1),
        ),
        decodes=Decodes(*(np.array([number], np.int32) for number in (4, 8, 5))),
    )
    layout = logit_layout(plan)
    assert (layout.rows.tolist(), layout.sampled.tolist()) == ([0, 4, 5, 6, 7, 7, 8], [0, 1, 2, 3, 5, 6])
    assert (layout.samplers, layout.sampler_rows, layout.drafted) == ([1, 2], [1, 5], [2, 1])
    sampler = make_sampler()
    for slot in (4, 1, 2):
        assign(sampler, slot, SamplingParams(temperature=0.0, logprobs=0))
    best = torch.tensor([9, 2, 6, 3, 8, 8, 4])  # row by row; the second proposal of slot 1 is wrong
    decoded, outputs = run(sampler, plan, torch.eye(VOCAB)[best])
    assert decoded.tolist() == [9]
    assert [(o.token_ids, o.drafted) for o in outputs] == [((), 0), ((2, 6), 2), ((8, 4), 1)]
    assert [[item.token_id for item in o.logprobs] for o in outputs] == [[], [2, 6], [8, 4]]
    assert sampler.table.newest[[4, 1, 2]].tolist() == [9, 6, 4]


def test_seeds_use_all_64_bits() -> None:
    assert [signed64(n) for n in (0, 2**63 - 1, 2**63, 2**64 - 1, -1)] == [0, 2**63 - 1, -(2**63), -1, -1]
    logits = torch.zeros(1, VOCAB)
    texts = set()
    for seed in (0, 1, 2**32, 2**63, 2**64 - 1):
        sampler = make_sampler()
        assign(sampler, 0, SamplingParams(), seed=seed)
        texts.add(tuple(draw(sampler, [0], logits, start=i)[0] for i in range(20)))
    assert len(texts) == 5


@pytest.mark.parametrize(
    "params, kind",
    [
        (SamplingParams(temperature=0.0, top_p=0.5), "greedy"),
        (SamplingParams(top_k=1), "greedy"),
        (SamplingParams(top_k=-1, min_p=0.1), "full"),
        (SamplingParams(top_p=0.99), "truncated"),
        (SamplingParams(top_k=10**30), "truncated"),
    ],
)
def test_rows_are_drawn_the_cheapest_exact_way(params: SamplingParams, kind: str) -> None:
    assert draw_kind(params) == kind
    sampler = make_sampler()
    assign(sampler, 0, params)
    assert draw(sampler, [0], torch.eye(VOCAB)[:1] * 60) == [0]
