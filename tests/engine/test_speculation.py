"""Steps with draft tokens: whoever proposes, the text is what it would be without."""

import random
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from quire.core.errors import ConfigError
from quire.core.plan import BatchPlan, SequencePlan
from quire.core.request import SamplingParams
from quire.engine import sizing

from .fake_model import POISON, FakeRunner
from .harness import Harness, Sequence, in_columns, make_engine
from .scripted import SamplingDrafter, ScriptedDrafter
from .test_sampler import MIXED
from .test_step import PROMPT

TOKENS = 24
GREEDY = SamplingParams(temperature=0.0)


def right(text: list[int]) -> ScriptedDrafter:
    """Knows the text."""
    return ScriptedDrafter(lambda slot, known: text[len(known) :])


def wrong(text: list[int]) -> ScriptedDrafter:
    """Knows it, too, and always says something else."""
    return ScriptedDrafter(lambda slot, known: [(token + 1) % POISON for token in text[len(known) :]])


def sometimes(text: list[int]) -> ScriptedDrafter:
    """Right for a random while, and of random length."""
    dice = random.Random(5)

    def guess(slot: int, known: list[int]) -> list[int]:
        ahead = text[len(known) : len(known) + dice.randrange(8)]
        place = dice.randrange(8)
        return [*ahead[:place], *(dice.randrange(POISON) for _ in ahead[place:])]

    return ScriptedDrafter(guess)


def always(guess: list[int], slot: int, known: list[int]) -> list[int]:
    """Whatever is known."""
    return guess


def plain(params: SamplingParams, count: int = TOKENS, **more: Any) -> Sequence:
    """The text without drafts."""
    harness = Harness(make_engine(FakeRunner(), **more))
    sequence = harness.add(0, PROMPT, params, 7)
    harness.generate(sequence, count + 20)
    return sequence


@pytest.mark.parametrize("drafter", [right, wrong, sometimes])
@pytest.mark.parametrize("windows", [(None, 6), (6, 3), (1, None, 5)])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_greedy_text_is_the_same(drafter: Any, windows: tuple[int | None, ...], page_size: int) -> None:
    harness = Harness(make_engine(FakeRunner(windows), page_size=page_size), drop_windows=True)
    text = [*PROMPT, *harness.generate(harness.add(3, PROMPT), TOKENS + 10)]
    harness = Harness(make_engine(FakeRunner(windows), drafter(text), page_size=page_size), True, drafts=5)
    sequence = harness.add(3, PROMPT)
    assert harness.generate(sequence, TOKENS, chunk=7) == text[len(PROMPT) :][:TOKENS]
    kept = harness.engine.cache.kept[3]
    assert kept.flatten().tolist() == [sequence.kept[row] for row in range(harness.rows)]
    assert harness.engine.cache.computed[3] == len(sequence.tokens) - 1
    if drafter is right:
        assert len(sequence.outputs) <= 3 + TOKENS // 6 + 1
        assert all(output.drafted == max(0, len(output.token_ids) - 1) for output in sequence.outputs)
    if drafter is wrong:
        assert {output.drafted for output in sequence.outputs} == {0, 5}
        assert all(len(output.token_ids) <= 1 for output in sequence.outputs)


@pytest.mark.parametrize("params", [*MIXED, SamplingParams(temperature=1.3, top_p=0.9, min_tokens=30, logprobs=2)])
@pytest.mark.parametrize("drafter", [right, sometimes])
def test_sampled_text_is_the_same_where_proposals_are_not_drawn(params: SamplingParams, drafter: Any) -> None:
    """Penalties, bias and masks go along the proposals; log-probabilities are of the accepted tokens."""
    alone = plain(params)
    harness = Harness(make_engine(FakeRunner(), drafter(alone.tokens)), drafts=6)
    sequence = harness.add(0, PROMPT, params, 7)
    assert harness.generate(sequence, TOKENS) == alone.output_ids[:TOKENS]
    before, after = ([item for output in s.outputs for item in output.logprobs] for s in (alone, sequence))
    if params.logprobs is not None:
        assert len(after) == len(sequence.output_ids)
        for one, other in zip(before, after, strict=False):
            assert (one.token_id, [i for i, _ in one.top]) == (other.token_id, [i for i, _ in other.top])
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)


@pytest.mark.parametrize("params", [GREEDY, *(SamplingParams(**kind, seed=3) for kind in (
    {"temperature": 0.8}, {"top_k": 5}, {"top_p": 0.7, "frequency_penalty": 0.5, "min_tokens": 20})
)])  # fmt: skip
def test_a_seed_gives_the_same_text_from_drawn_proposals_too(params: SamplingParams) -> None:
    """And a draft that is the target itself is always right: both draw by the same noise."""
    alone, runner = plain(params), FakeRunner()
    itself = SamplingDrafter(lambda known: runner.dense_logits(known)[-1])
    other = FakeRunner()
    other.head = other.head + 0.4 * torch.randn(other.head.shape, generator=torch.Generator().manual_seed(9))
    another = SamplingDrafter(lambda known: other.dense_logits(known)[-1])
    for drafter in (itself, another):
        harness = Harness(make_engine(FakeRunner(), drafter), drafts=4)
        sequence = harness.add(0, PROMPT, params, 7)
        assert harness.generate(sequence, TOKENS) == alone.output_ids[:TOKENS]
        accepted = [len(output.token_ids) - 1 for output in sequence.outputs if output.drafted]
        assert set(accepted) == {4} if drafter is itself else 0 < sum(accepted) < 4 * len(accepted)


@pytest.mark.parametrize("columns", [False, True])
def test_a_mixed_batch_gives_what_each_sequence_gets_alone(columns: bool) -> None:
    """Some propose, some do not, prompts go on in chunks, all with their own parameters."""
    kinds = [params for params in MIXED if params.seed is None][:5]
    texts = []
    for slot, params in enumerate(kinds):
        harness = Harness(make_engine(FakeRunner()))
        sequence = harness.add(slot, PROMPT[slot:], params, slot)
        harness.generate(sequence, TOKENS + 20)
        texts.append(sequence.tokens)
    dice = random.Random(2)

    def guess(slot: int, known: list[int]) -> list[int]:
        ahead = texts[slot][len(known) :]
        return [token if dice.random() < 0.7 else 1 for token in ahead[: dice.randrange(6)]]

    harness = Harness(make_engine(FakeRunner(), ScriptedDrafter(guess)), drop_windows=True)
    if columns:
        in_columns(harness.engine, known=True)
    sequences = [harness.add(slot, PROMPT[slot:], params, slot) for slot, params in enumerate(kinds)]
    while open_ := [sequence for sequence in sequences if len(sequence.output_ids) < TOKENS]:
        harness.drafts = dice.randrange(5)
        harness.step([(s, min(dice.randrange(1, 9), len(s.tokens) - s.computed)) for s in open_])
    for sequence, text in zip(sequences, texts, strict=True):
        assert sequence.tokens == text[: len(sequence.tokens)]


def test_a_drafter_hears_all_known_tokens_and_slots_change_hands() -> None:
    drafter = ScriptedDrafter(lambda slot, known: [3])
    harness = Harness(make_engine(FakeRunner(), drafter))
    for prompt in (PROMPT, PROMPT[:4]):
        sequence = harness.add(1, prompt)
        harness.drafts = 0
        harness.generate(sequence, 4)
        harness.drafts = 1
        harness.step([(sequence, 1)])
        assert drafter.known[1] == sequence.tokens[: len(drafter.known[1])] and len(drafter.known[1]) == len(prompt) + 4
        harness.release(sequence)


def test_proposals_that_are_no_tokens_are_ignored() -> None:
    for guess, drafted in (([1, 2, 40, 3], 2), ([-7], 0), ([2**31 - 1], 0)):
        harness = Harness(make_engine(FakeRunner(), ScriptedDrafter(partial(always, guess))), drafts=4)
        sequence = harness.add(0, PROMPT)
        harness.generate(sequence, 5)
        assert sequence.outputs[0].drafted == drafted
        assert sequence.output_ids[:5] == plain(GREEDY).output_ids[:5]


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("windows", [(None, 6), (6, 6)])
def test_a_proposal_without_finite_values_harms_nobody(windows: tuple[int | None, ...], columns: bool) -> None:
    harness = Harness(make_engine(FakeRunner(windows)))
    text = harness.generate(harness.add(0, PROMPT), TOKENS)
    poison = ScriptedDrafter(lambda slot, known: [text[len(known) - len(PROMPT)], POISON, 3] if slot == 0 else [4, 5])
    harness = Harness(make_engine(FakeRunner(windows), poison), drafts=3)
    if columns:
        in_columns(harness.engine, known=True)
    first, second = harness.add(0, PROMPT), harness.add(1, PROMPT)
    while len(first.output_ids) < TOKENS - 2:
        outputs = harness.step([(s, len(s.tokens) - s.computed) for s in (first, second)])
        assert [output.error for output in outputs] == [None, None] and outputs[0].drafted == 3
    assert first.output_ids == text[: len(first.output_ids)] and second.output_ids == text[: len(second.output_ids)]


def test_a_prompt_without_finite_values_still_fails_alone() -> None:
    harness = Harness(make_engine(FakeRunner(), ScriptedDrafter(lambda slot, known: [4, 5])), drafts=2)
    good, bad = harness.add(0, PROMPT), harness.add(1, [*PROMPT[:6], POISON, *PROMPT[:3]])
    outputs = harness.step([(good, len(PROMPT)), (bad, 10)])
    assert outputs[0].error is None and outputs[1].error == "the model produced non-finite values"
    assert outputs[1].token_ids == ()


def test_without_a_drafter_nothing_is_proposed() -> None:
    harness = Harness(make_engine(FakeRunner()), drafts=3)
    sequence = harness.add(0, PROMPT)
    assert harness.generate(sequence, TOKENS) == plain(GREEDY).output_ids[:TOKENS]
    assert all(output.drafted == 0 for output in sequence.outputs)


def test_warm_up_finds_costs_and_leaves_no_trace() -> None:
    drafter = ScriptedDrafter(lambda slot, known: [1, 2, 3])
    engine = make_engine(FakeRunner(), drafter, draft_tokens=3)
    assert engine.info.draft is not None and (engine.info.draft.most, engine.info.draft.fixed) == (3, True)
    engine.warm_up()
    costs = engine.info.draft.costs
    # Six sequences of up to four rows.
    assert [rows for rows, _ in costs.rows] == [1, 2, 4, 8, 16]
    assert [sequences for sequences, _ in costs.drafts] == [1, 2, 4]
    assert all(seconds > 0 for _, seconds in (*costs.rows, *costs.drafts))
    cache = engine.cache
    assert not any(tensor.any() for tensor in (cache.pool, cache.kept, cache.page_table, cache.entry_positions))
    assert engine.sampler.table.states == {} and drafter.known == {}
    harness = Harness(engine, drafts=3)
    assert harness.generate(harness.add(0, PROMPT), TOKENS) == plain(GREEDY).output_ids[:TOKENS]


def test_a_tiny_pool_is_no_obstacle_to_warming_up() -> None:
    for settings in ({"max_model_len": 3}, {"max_model_len": 2}, {"kv_memory": 2 * 4 * 4 * 68}):
        engine = make_engine(FakeRunner(), ScriptedDrafter(lambda slot, known: [1]), **settings)
        engine.warm_up()
        assert engine.info.draft is not None


def test_the_newest_token_is_the_last_accepted_one() -> None:
    """A decode that is launched right behind finds it on the device."""
    alone = plain(GREEDY)
    harness = Harness(make_engine(FakeRunner(), right(alone.tokens)), drafts=3)
    sequence = harness.add(0, PROMPT)
    harness.generate(sequence, 4)
    assert int(harness.engine.sampler.table.newest[0]) == sequence.tokens[-1]


def test_a_prompts_last_chunk_may_be_followed_by_proposals() -> None:
    alone = plain(GREEDY)
    engine = make_engine(FakeRunner(), right(alone.tokens))
    harness = Harness(engine, drafts=4)
    sequence = harness.add(0, PROMPT)
    (output,) = harness.step([(sequence, len(PROMPT))])
    assert output.token_ids == tuple(alone.output_ids[:5]) and output.drafted == 4
    assert engine.step(BatchPlan((SequencePlan(sequence.slot, 23, tuple(sequence.tokens[-1:]), True),))).sequences


def test_memory_is_left_for_a_drafts_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much per byte of the target's as it takes; what the operator gives the target's is the target's."""
    monkeypatch.setattr(sizing, "free_memory", lambda device: 1 << 30)
    layout, cpu = make_engine(FakeRunner()).cache.layout, torch.device("cpu")
    alone = sizing.num_pages(layout, None, cpu, 10**9)
    assert sizing.num_pages(layout, None, cpu, 10**9, draft_share=0.25) == pytest.approx(alone / 1.25, abs=1)
    given = [sizing.num_pages(layout, 1 << 20, cpu, 10**9, draft_share=share) for share in (0.0, 0.25)]
    assert given[0] == given[1]
    endless = replace(layout, max_model_len=2**30)
    for budget in (None, 1 << 20):
        with pytest.raises(ConfigError, match="page tables of"):
            sizing.num_pages(endless, budget, cpu, 10**9)
