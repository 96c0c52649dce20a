"""Engine steps with a tiny model: every way of cutting the work gives the dense reference's tokens."""

import pytest
import torch

from quire.core.request import SamplingParams

from .fake_model import POISON, FakeRunner
from .harness import Harness, Sequence, make_engine

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8]
TOKENS = 12


def dense_greedy(runner: FakeRunner, prompt: list[int], count: int = TOKENS) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(runner.dense_logits(ids)[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 7, 8, 19])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_chunks_of_any_size_give_the_dense_tokens(chunk: int, page_size: int) -> None:
    runner = FakeRunner()
    harness = Harness(make_engine(runner, page_size=page_size))
    assert harness.generate(harness.add(0, PROMPT), TOKENS, chunk) == dense_greedy(runner, PROMPT)


@pytest.mark.parametrize("windows", [(None, 6), (6, 3), (1, None, 5)])
@pytest.mark.parametrize("chunk", [1, 3, 8, 19])
def test_dropped_window_pages_are_not_missed(windows: tuple[int | None, ...], chunk: int) -> None:
    runner = FakeRunner(windows)
    harness = Harness(make_engine(runner), drop_windows=True)
    sequence = harness.add(2, PROMPT)
    assert harness.generate(sequence, 20, chunk) == dense_greedy(runner, PROMPT, 20)
    windowed = next(i for i, w in enumerate(windows) if w is not None)
    full = len(PROMPT) + 19
    kept = harness.engine.cache.kept[2, windowed]
    assert (kept < full).all() and kept.tolist() == [sequence.kept[2 * windowed], sequence.kept[2 * windowed + 1]]


def run_mixed(harness: Harness, sequences: list[Sequence], chunks: list[int], count: int) -> None:
    """All together, each with its own chunk size, until each has `count` tokens."""
    while open_ := [(s, c) for s, c in zip(sequences, chunks, strict=True) if len(s.output_ids) < count]:
        harness.step([(s, min(c, len(s.tokens) - s.computed)) for s, c in open_])


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), SamplingParams(temperature=0.9, top_p=0.8)])
def test_a_mixed_batch_gives_what_each_sequence_gets_alone(params: SamplingParams) -> None:
    prompts = [PROMPT, PROMPT[:1], PROMPT[3:9], PROMPT[2:], PROMPT[:5]]
    alone = []
    for seed, prompt in enumerate(prompts):
        harness = Harness(make_engine(FakeRunner()))
        alone.append(harness.generate(harness.add(0, prompt, params, seed), TOKENS))
    harness = Harness(make_engine(FakeRunner()), drop_windows=True)
    sequences = [harness.add(5 - i, prompt, params, i) for i, prompt in enumerate(prompts)]
    run_mixed(harness, sequences, [4, 1, 3, 100, 2], TOKENS)
    assert [s.output_ids for s in sequences] == alone


def test_a_returning_sequence_goes_on_where_it_was() -> None:
    """After a preemption everything is computed again, in another slot and other pages."""
    params = SamplingParams(temperature=1.1, presence_penalty=0.7, frequency_penalty=0.3, repetition_penalty=1.2)
    harness = Harness(make_engine(FakeRunner()))
    whole = harness.generate(harness.add(0, PROMPT, params, 7), TOKENS)
    harness = Harness(make_engine(FakeRunner()))
    first = harness.add(1, PROMPT, params, 7)
    harness.generate(first, 5)
    harness.release(first)
    other = harness.add(1, PROMPT[::-1])
    harness.generate(other, 3)
    again = harness.add(3, PROMPT, params, 7, output=tuple(first.output_ids))
    assert harness.generate(again, TOKENS, chunk=6) == whole


@pytest.mark.parametrize("windows", [(None, 6), (6, 6)])
def test_nan_ends_one_sequence_and_touches_no_other(windows: tuple[int | None, ...]) -> None:
    runner = FakeRunner(windows)
    harness = Harness(make_engine(runner), drop_windows=True)
    good, bad = harness.add(0, PROMPT), harness.add(1, [*PROMPT[:6], POISON, *PROMPT[:3]])
    run_mixed(harness, [good], [8], 4)
    outputs = harness.step([(good, 1), (bad, 10)])
    assert outputs[1].error == "the model produced non-finite values" and outputs[1].token_ids == ()
    assert outputs[0].error is None and len(outputs[0].token_ids) == 1
    # The next owner of the poisoned pages fills them only in part.
    harness.release(bad)
    harness.free.sort(key=lambda page: not bool(harness.engine.cache.pool[page].isnan().any()))
    heir = harness.add(1, PROMPT[:6])
    run_mixed(harness, [good, heir], [1, 3], TOKENS)
    assert good.output_ids == dense_greedy(runner, PROMPT)
    assert heir.output_ids == dense_greedy(runner, PROMPT[:6])


def test_logprobs_are_the_models_own() -> None:
    """Of the raw distribution, whatever temperature, bias and truncation decide the draw."""
    runner = FakeRunner()
    harness = Harness(make_engine(runner))
    params = SamplingParams(temperature=2.0, top_k=7, logit_bias={4: 5.0}, logprobs=3, prompt_logprobs=2)
    sequence = harness.add(0, PROMPT, params, 11)
    plain = harness.add(1, PROMPT)
    run_mixed(harness, [sequence, plain], [5, 5], TOKENS)
    reference = runner.dense_logits(sequence.tokens).log_softmax(-1)
    drawn = [lp for output in sequence.outputs for lp in output.logprobs]
    scored = [lp for output in sequence.outputs for lp in output.prompt_logprobs]
    assert [lp.token_id for lp in scored + drawn] == sequence.tokens[1:]
    for position, item in enumerate(scored + drawn):
        row = reference[position]
        assert item.logprob == pytest.approx(float(row[item.token_id]), abs=1e-4)
        values, ids = row.topk(2 if position < len(scored) else 3)
        assert [i for i, _ in item.top] == ids.tolist()
        assert [v for _, v in item.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert all(not output.logprobs and not output.prompt_logprobs for output in plain.outputs)


def test_rows_know_how_long_their_sequence_can_get() -> None:
    runner = FakeRunner()
    harness = Harness(make_engine(runner))
    harness.step([(harness.add(0, PROMPT[:2]), 2), (harness.add(4, PROMPT[:3]), 3)])
    assert runner.seen_lengths[-1] == [100] * 5


def test_a_step_without_sequences_only_applies_changes() -> None:
    harness = Harness(make_engine(FakeRunner()))
    assert harness.step([]) == []


def test_warm_up_leaves_no_trace() -> None:
    engine = make_engine(FakeRunner())
    engine.warm_up()
    cache = engine.cache
    assert not any(tensor.any() for tensor in (cache.pool, cache.kept, cache.page_table, cache.entry_positions))
    assert engine.sampler.table.states == {}


def test_warm_up_refuses_a_broken_model() -> None:
    runner = FakeRunner()
    runner.head[5, 5] = torch.inf
    with pytest.raises(Exception, match="non-finite values in float32") as raised:
        make_engine(runner).warm_up()
    assert type(raised.value).__name__ == "ModelLoadError"
