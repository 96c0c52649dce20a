"""Steps that verify trees of draft tokens: whatever grows, the text is what it would be without."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from quire.core.plan import BatchPlan, IntArray, SequencePlan
from quire.core.pruning import PruneParams
from quire.core.request import SamplingParams
from quire.engine.graphs import DecodeGraphs
from quire.engine.trees import TreeRows
from quire.kernels.backend import Backend
from quire.pruning.quest import QuestSelector
from quire.speculation.drafter import Drafter, Draw, Proposals
from quire.speculation.history import TokenHistory

from . import harness as harness_module
from .fake_model import POISON, FakeRunner
from .harness import Harness, Sequence, make_engine
from .scripted import BranchingDrafter, SamplingDrafter, ScriptedDrafter, TreeDrafter
from .test_graphs import FakeCapture
from .test_sampler import MIXED
from .test_speculation import GREEDY, TOKENS, plain, right, sometimes, wrong
from .test_step import PROMPT

VOCAB = POISON
"""Of what is proposed beside: all whose values are finite."""
Tree = list[tuple[int, int]]


def depths(sequence: Sequence) -> list[int]:
    """Draft tokens that were right, of each step that had some."""
    return [len(output.token_ids) - 1 for output in sequence.outputs if output.drafted]


def entries(harness: Harness, sequence: Sequence) -> list[torch.Tensor]:
    """Per head, what its entries hold: keys and values, and their positions."""
    cache, size = harness.engine.cache, harness.engine.info.page_size
    found = []
    for row, pages in sequence.pages.items():
        table, count = cache.page_table[sequence.slot].flatten(0, 1)[row], sequence.kept[row]
        assert table[: len(pages)].tolist() == pages
        held = [cache.pool[pages].transpose(1, 2).reshape(len(pages) * size, -1)[:count]]
        found += [*held, cache.entry_positions[pages].flatten()[:count]]
    return found


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("drafter", [right, wrong, sometimes])
@pytest.mark.parametrize(("windows", "page_size"), [((None, 6), 4), ((6, 3), 1), ((1, None, 5), 16), ((None, None), 3)])
def test_text_and_cache_are_the_same(
    drafter: Any, windows: tuple[int | None, ...], page_size: int, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries of the accepted path lie one after another, across the borders of pages, as if computed in order."""
    monkeypatch.setattr(harness_module, "resolve_backend", lambda *_: backend)
    alone = Harness(make_engine(FakeRunner(windows), page_size=page_size), drop_windows=True)
    longer = alone.add(3, PROMPT)
    text = [*PROMPT, *alone.generate(longer, TOKENS + 12)]
    trees = BranchingDrafter(drafter(text), VOCAB)
    harness = Harness(make_engine(FakeRunner(windows), trees, page_size=page_size), True, drafts=9)
    sequence = harness.add(3, PROMPT)
    assert harness.generate(sequence, TOKENS, chunk=7) == text[len(PROMPT) :][:TOKENS]
    assert harness.engine.cache.computed[3] == len(sequence.tokens) - 1
    assert any(output.branched for output in sequence.outputs)
    assert drafter is not right or max(depths(sequence)) >= 6
    assert drafter is not wrong or max(depths(sequence)) <= 1
    if not any(windows):
        alone = Harness(make_engine(FakeRunner(windows), page_size=page_size))
        plainly = alone.add(3, PROMPT)
        alone.generate(plainly, len(sequence.output_ids))
        for mine, theirs in zip(entries(harness, sequence), entries(alone, plainly), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("params", [*MIXED, SamplingParams(temperature=1.3, top_p=0.9, min_tokens=30, logprobs=2)])
@pytest.mark.parametrize("drafter", [right, sometimes])
def test_sampled_text_is_the_same(params: SamplingParams, drafter: Any) -> None:
    """Penalties, bias and masks go along each node's own path; log-probabilities are of the accepted tokens."""
    alone = plain(params)
    harness = Harness(make_engine(FakeRunner(), BranchingDrafter(drafter(alone.tokens), VOCAB)), drafts=9)
    sequence = harness.add(0, PROMPT, params, 7)
    assert harness.generate(sequence, TOKENS) == alone.output_ids[:TOKENS]
    assert any(output.branched for output in sequence.outputs) and max(depths(sequence)) > 1
    before, after = ([item for output in s.outputs for item in output.logprobs] for s in (alone, sequence))
    if params.logprobs is not None:
        assert len(after) == len(sequence.output_ids)
        for one, other in zip(before, after, strict=False):
            assert (one.token_id, [i for i, _ in one.top]) == (other.token_id, [i for i, _ in other.top])
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)


def test_every_branch_can_be_the_right_one() -> None:
    """A full binary tree whose inner nodes are right on the right, left or some other way down: that way is taken."""
    text = plain(GREEDY, page_size=2).tokens

    def tree(way: list[int], slot: int, known: list[int], limit: int) -> Tree:
        nodes: Tree = []
        ahead = text[len(known) :]
        frontier = [(-1, True)]
        for depth, turn in enumerate(way):
            grown: list[tuple[int, bool]] = []
            for parent, on_path in frontier:
                for side in range(2):
                    good = on_path and side == turn
                    nodes.append((parent, ahead[depth] if good else (ahead[depth] + 1 + side) % VOCAB))
                    grown.append((len(nodes) - 1, good))
            frontier = grown
        return nodes

    for way in ([0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 1]):
        harness = Harness(make_engine(FakeRunner(), TreeDrafter(partial(tree, way)), page_size=2), drafts=14)
        sequence = harness.add(0, PROMPT)
        assert harness.generate(sequence, TOKENS) == text[len(PROMPT) :][:TOKENS]
        assert set(depths(sequence)) == {3}
        assert {(output.drafted, output.branched) for output in sequence.outputs} == {(14, 11)}


class AsTree(SamplingDrafter):
    """Hands in its chains as trees."""

    def propose(self, history: TokenHistory, slots: IntArray, most: IntArray, draw: Draw) -> Proposals:
        found = super().propose(history, slots, most, draw)
        shape = found.tokens.shape
        return Proposals(found.tokens, found.counts, np.broadcast_to(np.arange(shape[1]) - 1, shape).astype(np.int32))


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(top_p=0.8, frequency_penalty=0.5, seed=3)])
def test_a_tree_that_is_a_chain_is_the_chain(params: SamplingParams) -> None:
    """To the bit, and by the same rule."""
    other = FakeRunner()
    other.head = other.head + 0.4 * torch.randn(other.head.shape, generator=torch.Generator().manual_seed(9))
    pools, said = [], []
    for kind in (SamplingDrafter, AsTree):
        harness = Harness(make_engine(FakeRunner(), kind(lambda known: other.dense_logits(known)[-1])), drafts=4)
        sequence = harness.add(0, PROMPT, params, 7)
        harness.generate(sequence, TOKENS)
        pools.append(harness.engine.cache.pool)
        said.append(sequence.outputs)
    assert said[0] == said[1] and torch.equal(*pools)


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(top_k=5, seed=3, presence_penalty=0.5)])
def test_drawn_tokens_in_a_tree_are_coupled(params: SamplingParams) -> None:
    """Without a seed, too: the text is that of the seed that the server gave."""
    alone, other = plain(params), FakeRunner()
    other.head = other.head + 0.4 * torch.randn(other.head.shape, generator=torch.Generator().manual_seed(9))
    drawn = SamplingDrafter(lambda known: other.dense_logits(known)[-1])
    harness = Harness(make_engine(FakeRunner(), BranchingDrafter(drawn, VOCAB)), drafts=6)
    sequence = harness.add(0, PROMPT, params, 7)
    assert harness.generate(sequence, TOKENS) == alone.output_ids[:TOKENS]
    assert sum(depths(sequence)) > 5


def test_a_mixed_batch_gives_what_each_sequence_gets_alone() -> None:
    """Trees, chains and nothing beside one another, prompts in chunks, all with their own parameters."""
    kinds = [params for params in MIXED if params.seed is None][:5]
    texts = []
    for slot, params in enumerate(kinds):
        harness = Harness(make_engine(FakeRunner()))
        sequence = harness.add(slot, PROMPT[slot:], params, slot)
        harness.generate(sequence, TOKENS + 20)
        texts.append(sequence.tokens)
    dice = random.Random(2)

    def guess(slot: int, known: list[int], limit: int) -> Tree:
        ahead = texts[slot][len(known) :][: dice.randrange(limit + 1)]
        if slot % 2:
            return [(node - 1, token) for node, token in enumerate(ahead)]
        nodes: Tree = [(-1, (ahead[0] + 1) % VOCAB)] if ahead else []
        for depth, token in enumerate(ahead):
            nodes.append((len(nodes) - 1 if depth else -1, token if dice.random() < 0.8 else 1))
        return nodes

    harness = Harness(make_engine(FakeRunner(), TreeDrafter(guess)), drop_windows=True)
    sequences = [harness.add(slot, PROMPT[slot:], params, slot) for slot, params in enumerate(kinds)]
    while open_ := [sequence for sequence in sequences if len(sequence.output_ids) < TOKENS]:
        harness.drafts = dice.randrange(6)
        harness.step([(s, min(dice.randrange(1, 9), len(s.tokens) - s.computed)) for s in open_])
    for sequence, text in zip(sequences, texts, strict=True):
        assert sequence.tokens == text[: len(sequence.tokens)]
    assert sum(sum(depths(sequence)) for sequence in sequences) > 20


@pytest.mark.parametrize(
    ("nodes", "drafted", "branched"),
    [
        ([(-1, 1), (-1, 2), (0, 3), (5, 4), (0, 4)], 3, 1),  # follows a later one
        ([(-1, 1), (1, 2)], 1, 0),  # follows itself
        ([(-1, 1), (-2, 2)], 1, 0),
        ([(-1, 1), (0, 5), (0, 5), (0, 6)], 2, 0),  # the same twice
        ([(-1, 1), (-1, 40), (0, 3)], 1, 0),  # no token
        ([(-1, 1), (-1, 2), (1, 2), (0, 2)], 4, 2),  # the same token elsewhere is fine
        ([(0, 1)], 0, 0),
    ],
)
def test_malformed_trees_are_cut(nodes: Tree, drafted: int, branched: int) -> None:
    harness = Harness(make_engine(FakeRunner(), TreeDrafter(lambda slot, known, limit: nodes)), drafts=5)
    sequence = harness.add(0, PROMPT)
    harness.generate(sequence, 5)
    assert (sequence.outputs[0].drafted, sequence.outputs[0].branched) == (drafted, branched)
    assert sequence.output_ids[:5] == plain(GREEDY).output_ids[:5]


@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_branch_without_finite_values_harms_nobody(place: int) -> None:
    harness = Harness(make_engine(FakeRunner()))
    text = [*PROMPT, *harness.generate(harness.add(0, PROMPT), TOKENS)]

    def poison(slot: int, known: list[int], limit: int) -> Tree:
        ahead = text[len(known) :]
        nodes = [(-1, 1 if ahead[0] != 1 else 2), (-1, ahead[0]), (0, 5), (1, 9)]
        nodes[place] = (nodes[place][0], POISON)
        return nodes if slot == 0 else [(-1, 4), (-1, 5)]

    harness = Harness(make_engine(FakeRunner(), TreeDrafter(poison)), drafts=4)
    first, second = harness.add(0, PROMPT), harness.add(1, PROMPT)
    while len(first.output_ids) < TOKENS - 2:
        outputs = harness.step([(s, len(s.tokens) - s.computed) for s in (first, second)])
        assert [output.error for output in outputs] == [None, None] and outputs[0].drafted == 4
    for sequence in (first, second):
        assert sequence.tokens == text[: len(sequence.tokens)]


def last_plan(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> Callable[[], SequencePlan]:
    """What the engine computed of a single sequence in its last step."""
    seen: list[BatchPlan] = []
    engine: Any = harness.engine
    forward = engine._forward

    def watched(plan: BatchPlan, *more: Any) -> Any:
        seen.append(plan)
        return forward(plan, *more)

    monkeypatch.setattr(engine, "_forward", watched)
    return lambda: seen[-1].sequences[-1]


@pytest.mark.parametrize(
    ("prune", "whole"),
    [
        (None, True),
        (PruneParams(policy="knorm", keep=0.5, window=4, sinks=1, floor=6), True),  # looks at keys alone, later
        (PruneParams(policy="snapkv", keep=0.5, window=4, sinks=1, floor=6), False),
        (PruneParams(policy="h2o", keep=0.5, window=4, sinks=1, floor=6), False),
        (PruneParams(policy="quest", keep=0.5, window=2, sinks=1, floor=4), False),
    ],
)
def test_whose_rows_are_read_gets_the_first_path(
    prune: PruneParams | None, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QuestSelector, "dense_layers", 0)  # so that it selects in a model of one layer
    nodes = [(-1, 3), (-1, 4), (0, 5), (0, 6), (1, 7), (2, 8)]
    harness = Harness(make_engine(FakeRunner(), TreeDrafter(lambda slot, known, limit: nodes)), drafts=6)
    computed = last_plan(harness, monkeypatch)
    sequence = harness.add(0, PROMPT, prune=prune)
    (output,) = harness.step([(sequence, len(PROMPT))])
    part = computed()
    if whole:
        assert part.parents == tuple(parent for parent, _ in nodes) and output.drafted == 6
    else:
        assert part.parents == () and part.token_ids[-3:] == (3, 5, 8) and output.drafted == part.drafts == 3


def test_rows_beyond_the_masks_get_the_first_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of a prompt and a tree have 64 rows at most."""
    nodes = [(-1, 3), (-1, 4), (1, 5)]
    alone = Harness(make_engine(FakeRunner()))
    prompt = (PROMPT * 4)[:62]
    text = alone.generate(alone.add(0, prompt), 3)
    nodes[1:] = [(-1, text[0]), (1, text[1])]
    for count, whole in ((61, True), (62, False)):
        drafter = TreeDrafter(lambda slot, known, limit: nodes)
        harness = Harness(make_engine(FakeRunner(), drafter, max_batch_tokens=100), drafts=3)
        computed = last_plan(harness, monkeypatch)
        sequence = harness.add(0, prompt)
        if whole:
            harness.step([(sequence, 1)])
        (output,) = harness.step([(sequence, count)])
        assert bool(computed().parents) == whole
        assert output.token_ids == tuple(text if whole else text[:1])


def test_masks_and_places() -> None:
    """Against the definition, one row at a time."""
    dice = random.Random(1)
    parts, rows = [], 0
    for slot in range(4):
        known, count = (1, 5, 2, 48)[slot], (5, 0, 9, 16)[slot]
        parents = tuple(dice.randrange(-1, node) if node else -1 for node in range(count))
        tokens = tuple(range(known + count))
        parts.append(SequencePlan(harness_module.SlotId(slot), 10, tokens, True, drafts=count, parents=parents))
        rows += known + count
    plan = BatchPlan(tuple(parts))
    firsts = np.cumsum([0, *(len(part.token_ids) for part in parts[:-1])])
    trees = TreeRows.of(plan, firsts, rows)
    assert trees is not None
    row = 0
    for part in parts:
        known = len(part.token_ids) - part.drafts
        for place in range(len(part.token_ids)):
            path, node = [], place - known
            while node >= 0:
                path.append(node)
                node = part.parents[node]
            expected = sum(1 << i for i in [*range(known), *(known + i for i in path)]) if path else 0
            assert int(trees.visible[row]) % 2**64 == expected
            assert place + trees.shifts[row] == (known - 1 + len(path) if path else place)
            row += 1
    assert TreeRows.of(BatchPlan(tuple(part for part in parts if not part.parents)), firsts[:1], 5) is None


@pytest.mark.parametrize("page_size", [1, 4])
def test_rows_that_stay_move_up_in_every_head(page_size: int) -> None:
    """Also where heads keep unequal numbers of entries, as pruned ones do."""
    cache = make_engine(FakeRunner((None, None)), page_size=page_size).cache
    draw = torch.Generator().manual_seed(4)
    cache.pool.copy_(torch.randn(cache.pool.shape, generator=draw))
    cache.entry_positions.copy_(torch.randint(99, cache.entry_positions.shape, generator=draw))
    pages = torch.randperm(cache.num_pages, generator=draw)[: cache.page_table[:3].numel()]
    cache.page_table[:3] = pages.view(cache.page_table[:3].shape)
    cache.kept[:3] = torch.randint(2, 9, cache.kept[:3].shape, generator=draw)
    staying = {0: [0, 2, 3, 7], 1: [0, 1, 2], 2: [0, 5]}
    pool, positions = cache.pool.clone(), cache.entry_positions.clone()
    for slot, rows in staying.items():
        for head, count in zip(cache.page_table[slot].flatten(0, 1), cache.kept[slot].flatten(), strict=True):
            for place, row in enumerate(rows):
                (a, i), (b, j) = (divmod(int(count) + n, page_size) for n in (row, place))
                pool[head[b], :, j] = cache.pool[head[a], :, i]
                positions[head[b], j] = cache.entry_positions[head[a], i]
    cache.keep_rows(staying.keys(), staying.values())  # type: ignore[arg-type]
    assert torch.equal(cache.pool, pool) and torch.equal(cache.entry_positions, positions)


def test_graphs_verify_trees() -> None:
    """Beside those of chains, in padded batches; the text is the same, and replays of both kinds come about."""
    runner, prompts = FakeRunner(), [PROMPT, PROMPT[3:], PROMPT[:7]]
    texts = []
    for slot, prompt in enumerate(prompts):
        harness = Harness(make_engine(runner))
        sequence = harness.add(slot, prompt)
        harness.generate(sequence, 50)
        texts.append(sequence.tokens)

    def tree(slot: int, known: list[int], limit: int) -> Tree:
        first, second = texts[slot][len(known) :][:2]
        chain = [(-1, first), (0, second), (1, 5), (2, 7)]
        return chain if len(known) % 2 else [(-1, (first + 1) % VOCAB), (-1, first), (0, 9), (1, second)]

    harness = Harness(make_engine(runner, TreeDrafter(tree)), drafts=0)
    engine: Any = harness.engine
    capture = FakeCapture()
    engine._graphs = DecodeGraphs(runner, engine.cache, 6, "reference", capture, most_drafts=4)
    sequences = [harness.add(slot, prompt) for slot, prompt in enumerate(prompts)]
    harness.step([(s, len(s.prompt)) for s in sequences])
    harness.drafts = 4
    for turn in range(8):
        harness.step([(s, 1) for s in sequences[: 1 + turn % 3]])
    for sequence, text in zip(sequences, texts, strict=True):
        assert sequence.tokens == text[: len(sequence.tokens)]
        assert min(depths(sequence)) >= 2
    assert capture.replayed == 8 + capture.captured
    assert {kind for _, kind in engine._graphs._graphs} == {"drafts", "trees"}


def test_a_model_that_is_hidden_in_trees_is_still_right() -> None:
    """Whoever drafts hears what was accepted and nothing of the branches."""
    text = plain(GREEDY).tokens
    inner = ScriptedDrafter(lambda slot, known: text[len(known) :])
    drafter: Drafter = BranchingDrafter(inner, VOCAB)
    harness = Harness(make_engine(FakeRunner(), drafter), drafts=6)
    sequence = harness.add(2, PROMPT)
    while len(sequence.output_ids) < TOKENS:
        harness.step([(sequence, len(sequence.tokens) - sequence.computed)])
        assert inner.known[2] == sequence.tokens[: len(inner.known[2])]
    assert int(harness.engine.sampler.table.newest[2]) == sequence.tokens[-1]
