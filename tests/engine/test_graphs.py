"""Decode graphs with a fake capture: sizes, padding, laziness, and the same tokens as without them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch

from quire.core.ids import SlotId
from quire.core.plan import BatchPlan, Decodes, PageGrants, SequencePlan
from quire.core.request import SamplingParams
from quire.engine.engine import Engine
from quire.engine.graphs import DecodeGraphs, graph_sizes
from quire.engine.inputs import build_inputs

from .fake_model import FakeRunner
from .harness import Harness, Sequence, in_columns, make_engine

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7], [9], [3, 2, 3, 8]]
MIXED = [SamplingParams(temperature=0.0), SamplingParams(temperature=0.9), SamplingParams(top_p=0.7)]


class FakeCapture:
    """Holds on to the work, as a graph would, and counts."""

    def __init__(self) -> None:
        self.captured = 0
        self.replayed = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        work()

        def replay() -> None:
            self.replayed += 1
            work()

        return replay


def with_graphs(
    runner: FakeRunner, capture: Callable[..., Callable[[], None]], backend: Literal["cpu", "reference"] = "reference"
) -> Engine:
    engine = make_engine(runner)
    engine._graphs = DecodeGraphs(runner, engine.cache, 6, backend, capture)
    return engine


def run(engine: Engine, count: int = 9) -> list[list[int]]:
    """All prompts, joining one by one in odd slots, so that the batch grows; then they leave in another order."""
    harness = Harness(engine, drop_windows=True)
    sequences: list[Sequence] = []
    for index, prompt in enumerate(PROMPTS):
        sequences.append(harness.add((4, 1, 3, 0, 5)[index], prompt, MIXED[index % 3], seed=index))
        harness.step([(sequences[-1], len(prompt))])
        harness.step([(sequence, 1) for sequence in reversed(sequences)])
    while open_ := [s for s in sequences if len(s.output_ids) < count + s.seed]:
        harness.step([(sequence, 1) for sequence in open_])
    return [sequence.output_ids for sequence in sequences]


def test_sizes_cover_every_batch_and_are_at_most_sixteen() -> None:
    for limit in (1, 2, 3, 7, 16, 50, 64, 200, 256, 1000):
        sizes = graph_sizes(limit)
        assert len(sizes) <= 16 and list(sizes) == sorted(set(sizes)) and sizes[-1] == min(limit, 256)


@pytest.mark.parametrize("columns", ["", "known", "unknown"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_padded_replays_give_the_plain_tokens(backend: Literal["cpu", "reference"], columns: str) -> None:
    """Also beside sliding windows, with slots that are not the batch's rows, and for every way of drawing."""
    runner = FakeRunner()
    capture = FakeCapture()
    engine = with_graphs(runner, capture, backend)
    if columns:
        in_columns(engine, columns == "known")
    assert run(engine) == run(make_engine(runner))
    assert capture.captured == 4, "sizes 1, 2, 4 and 6, each at its first use"
    assert capture.replayed > 12
    assert not engine.cache.padded_kept[-1].any(), "padding holds no entries"
    assert (engine.cache.padded_table[-1] == engine.cache.num_pages).all()


def test_padding_writes_to_no_page_of_anybody() -> None:
    runner = FakeRunner()
    engine = with_graphs(runner, FakeCapture())
    harness = Harness(engine)
    first, second, third = (harness.add(slot, PROMPTS[slot]) for slot in range(3))
    for sequence in (first, second, third):
        harness.step([(sequence, len(sequence.prompt))])
    before = engine.cache.pool.clone()
    harness.step([(first, 1), (second, 1), (third, 1)])
    changed = (engine.cache.pool != before).flatten(1).any(1).nonzero().squeeze(1).tolist()
    heads = harness.rows
    mine = {s.pages[row][-1] for s in (first, second, third) for row in range(heads)}
    assert set(changed) == mine | {engine.cache.num_pages}


def test_only_pure_decodes_are_replayed() -> None:
    runner, capture = FakeRunner(), FakeCapture()
    harness = Harness(with_graphs(runner, capture))
    long, scored = harness.add(0, PROMPTS[2]), harness.add(1, PROMPTS[0], SamplingParams(prompt_logprobs=0))
    harness.step([(long, 1)])  # a prompt's first token, which samples nothing
    harness.step([(long, 6), (scored, 1)])
    harness.step([(long, 1), (scored, 4)])
    assert capture.captured == 0
    harness.step([(long, 1), (scored, 1)])
    assert (capture.captured, capture.replayed) == (1, 2), "the first replay is a trial"


def verification(engine: Engine, drafts: tuple[int, ...]) -> BatchPlan:
    """Of sequences in odd slots whose prompts are computed: the newest token of each and so many proposals."""
    engine.cache.clear(torch.arange(engine.cache.num_pages))
    harness = Harness(engine)
    sequences = [harness.add((4, 1, 3, 0, 5)[index], PROMPTS[index]) for index in range(len(drafts))]
    harness.step([(sequence, len(sequence.prompt)) for sequence in sequences])
    both = list(zip(sequences, drafts, strict=True))
    grants = [grant for sequence, count in both for grant in harness._grants(sequence, 1 + count)]
    parts = tuple(
        SequencePlan(s.slot, s.computed, (s.tokens[-1], *range(1, 1 + count)), sample=True, drafts=count)
        for s, count in both
    )
    plan = BatchPlan(parts, grants=PageGrants(*np.array(grants, np.int32).reshape(-1, 4).T))
    engine.cache.apply(plan)
    return plan


@pytest.mark.parametrize(
    ("steps", "captured"),
    [
        ([(1, 1, 1), (1, 1, 1, 1), (1, 1), (1,) * 5], 3),
        ([(3, 0, 9), (0, 0, 9, 1, 1), (2, 5), (0, 1), (0, 0, 0)], 3),
        ([(9,), (0, 9, 0), (9, 9, 9, 9, 9)], 2),
    ],
)
def test_drafts_are_verified_by_graphs_of_their_own(steps: list[tuple[int, ...]], captured: int) -> None:
    """Logits of every row as the plain forward pass gives them, however many rows each sequence brings."""
    runner, capture = FakeRunner(), FakeCapture()
    plain, padded = make_engine(runner), make_engine(runner)
    graphs = DecodeGraphs(runner, padded.cache, 6, "reference", capture, most_drafts=9)
    for drafts in steps:
        plan = verification(plain, drafts)
        inputs = build_inputs(plan, plain.cache, plain._max_lengths, plain.sampler.table.newest, "reference")
        rows = torch.arange(plan.num_tokens)
        expected = runner.forward(inputs.input_ids, inputs.rotations, inputs.lengths, inputs.context, rows)
        plan = verification(padded, drafts)
        assert graphs.takes(plan)
        step = graphs.run(plan, padded._max_lengths, padded.sampler.table.newest)
        assert step is not None
        torch.testing.assert_close(step.logits, expected)
        assert torch.equal(padded.cache.pool[:-1], plain.cache.pool[:-1])
        assert step.slots.tolist() == [part.slot for part in plan.sequences] == step.host_slots.tolist()
        kept = [int(count == 0) for count in drafts]
        assert step.new_entries.tolist() == kept == list(step.host_lengths), "of proposals none is kept yet"
    assert (capture.captured, capture.replayed) == (captured, captured + len(steps))


@torch.inference_mode()
def test_forced_tokens_come_along() -> None:
    """Their entries stay; what was drafted behind them waits to be judged."""
    runner = FakeRunner()
    plain, padded = make_engine(runner), make_engine(runner)
    graphs = DecodeGraphs(runner, padded.cache, 6, "reference", FakeCapture(), 9, lambda slot: True)
    for drafts in ((0, 0, 0), (0, 1, 2)):
        outputs = []
        for engine in (plain, padded):
            engine._graphs = graphs if engine is padded else None
            parts = [replace(part, drafts=count) for part, count in
                     zip(verification(engine, (2, 3, 2)).sequences, drafts, strict=True)]  # fmt: skip
            replayed = engine._decode(BatchPlan(tuple(parts)))
            assert (replayed is not None) == (engine is padded)
            logits, layout = replayed or engine._forward(BatchPlan(tuple(parts)), None, None)
            outputs.append((logits.clone(), layout.rows.tolist(), engine.cache._kept_host[[4, 1, 3], 0].tolist()))
        torch.testing.assert_close(*(output[0] for output in outputs))
        assert outputs[0][1:] == outputs[1][1:] and len(outputs[1][0]) == 3 + sum(drafts)


def test_only_verification_of_known_proposals_is_taken() -> None:
    runner = FakeRunner()
    engine = make_engine(runner)
    graphs = DecodeGraphs(runner, engine.cache, 6, "reference", FakeCapture(), most_drafts=9)
    uniform, wanted = (
        SequencePlan(SlotId(0), 4, (5, 6, 7), sample=True, drafts=2),
        SequencePlan(SlotId(1), 4, (5,), True),
    )
    assert graphs.takes(BatchPlan((uniform,)))
    assert graphs.takes(BatchPlan((uniform, wanted)))
    assert not graphs.takes(BatchPlan((replace(uniform, scratch=True),))), "entries that are not kept"
    assert not graphs.takes(BatchPlan((replace(wanted, drafts=2),))), "proposals are not known yet"
    assert not graphs.takes(BatchPlan((replace(uniform, drafts=1),))), "the rest of a prompt, and a proposal"
    graphs._binds = [True, False].__getitem__
    assert graphs.takes(BatchPlan((replace(uniform, drafts=1),))), "a token that a grammar forced, and a proposal"
    assert not graphs.takes(BatchPlan((replace(uniform, token_ids=(5,) * 40),))), "the rest of a prompt"
    columns = Decodes(*np.array([[1], [4], [5]], np.int32))
    assert graphs.takes(BatchPlan((uniform,), decodes=columns)) and graphs.takes(BatchPlan((), decodes=columns))
    few = DecodeGraphs(runner, engine.cache, 256, "reference", FakeCapture(), most_drafts=9)
    parts = tuple(replace(uniform, slot=SlotId(slot)) for slot in range(100))
    assert few.takes(BatchPlan(parts[:85])) and not few.takes(BatchPlan(parts[:86])), "so many rows hide their launches"


def test_what_cannot_be_captured_runs_plainly_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(work: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing\nand so on")

    runner = FakeRunner()
    assert run(with_graphs(runner, refuse)) == run(make_engine(runner))
    assert [record.getMessage() for record in caplog.records] == [
        "decode steps run without CUDA graphs: operation not permitted when stream is capturing"
    ]


def test_a_replay_that_is_not_the_step_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    runner = FakeRunner()
    assert run(with_graphs(runner, lambda work: lambda: None)) == run(make_engine(runner))
    assert [record.getMessage() for record in caplog.records] == [
        "decode steps run without CUDA graphs: a replay does not give the logits of the step it was captured from"
    ]


def test_a_poisoned_row_touches_no_other() -> None:
    """A graph computes all rows together; what is not finite stays in its own."""
    runner = FakeRunner()
    engine = with_graphs(runner, FakeCapture())
    harness = Harness(engine)
    good, bad = harness.add(0, PROMPTS[0]), harness.add(1, PROMPTS[1])
    harness.step([(good, 5), (bad, 2)])
    bad.tokens[-1] = 13  # the runner's token whose embedding is NaN
    outputs = harness.step([(good, 1), (bad, 1)])
    assert outputs[0].error is None and outputs[1].error is not None
    alone = Harness(make_engine(runner))
    assert good.output_ids == alone.generate(alone.add(0, PROMPTS[0]), 2)
    assert engine.cache.pool[-1].isfinite().all()
