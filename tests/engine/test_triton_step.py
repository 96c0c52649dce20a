"""Whole steps of a tiny native model on the Triton kernels (interpreted without a GPU) against plain torch."""

from pathlib import Path

import pytest
import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from quire.core.config import EngineConfig
from quire.core.pruning import PruneParams
from quire.core.request import Grammar, SamplingParams
from quire.engine.engine import Engine
from quire.engine.graphs import DecodeGraphs
from quire.kernels.backend import TRITON_BACKENDS, Backend
from quire.models.placement import Placement
from quire.pruning.quest import QuestSelector
from quire.speculation.drafter import Drafter

from ..kernels.triton_interpreter import ON_GPU
from ..models.conftest import load, make_checkpoint
from .harness import Harness, Sequence
from .scripted import SamplingDrafter, ScriptedDrafter, TreeDrafter
from .test_graphs import FakeCapture

PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8, min_p=0.02, seed=5),
    SamplingParams(temperature=1.0, top_k=30, top_p=0.9, repetition_penalty=1.3, presence_penalty=0.4, logprobs=3),
    SamplingParams(temperature=0.0, frequency_penalty=0.9),
]
BACKENDS: tuple[Backend, Backend] = ("triton", "reference")
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8, 9], [7, 9, 3, 2, 3, 8, 4], [6]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped heads, norms of queries and keys, gated feed-forward: every Triton operation of the native layers."""
    settings = {"num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2}
    return make_checkpoint(tmp_path_factory.mktemp("qwen3"), "qwen3", settings).folder


def make_engine(folder: Path, backend: Backend, drafter: Drafter | None = None) -> Engine:
    place = Placement(torch.device("cuda" if ON_GPU else "cpu"), torch.float32, backend)
    config = EngineConfig(model="tiny", page_size=4, max_num_seqs=5, max_batch_tokens=64, max_model_len=40)
    engine = Engine(load(folder, "native", place=place), config, "native", place)
    if drafter is not None:
        engine.draft_with(drafter, config)
    return engine


def run(engine: Engine, drafts: int = 0, grammar: Grammar | None = None) -> list[list[int]]:
    """A prompt in chunks beside decodes, then decodes alone; grammar: all but one sequence are bound to it."""
    harness = Harness(engine, drafts=drafts)
    sequences = [harness.add(4 - i, p, PARAMS[i], i, grammar=grammar if i else None) for i, p in enumerate(PROMPTS)]
    work: list[list[tuple[Sequence, int]]] = [[(sequences[0], 4)], [(sequences[0], 5), (sequences[1], 2)]]
    work += [[(sequences[1], 1), (sequences[2], 7), (sequences[0], 2), (sequences[3], 1)]]
    for step in work + [[(sequence, 1) for sequence in sequences]] * 4:
        harness.step([(s, min(count, len(s.tokens) - s.computed)) for s, count in step])
    return [sequence.output_ids for sequence in sequences]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)] if ON_GPU else ["cpu"])
def test_tokens_are_the_references_with_and_without_graphs(checkpoint: Path, device: str) -> None:
    expected = run(make_engine(checkpoint, "reference"))
    assert run(make_engine(checkpoint, "triton")) == expected
    engine, capture = make_engine(checkpoint, "triton"), FakeCapture()
    if device == "cpu":
        engine._graphs = DecodeGraphs(engine._runner, engine.cache, 5, "triton", capture)
    assert run(engine) == expected
    assert device == "cuda" or capture.replayed == 4 + capture.captured


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)] if ON_GPU else ["cpu"])
def test_proposals_change_no_token(checkpoint: Path, device: str) -> None:
    """By graphs, in whose steps some sequences bring proposals and some bring none."""
    expected = run(make_engine(checkpoint, "reference"))
    texts = {4 - i: [*prompt, *text] for i, (prompt, text) in enumerate(zip(PROMPTS, expected, strict=True))}

    def guess(slot: int, known: list[int]) -> list[int]:
        """Two tokens at every third position, the second wrong."""
        ahead = texts[slot][len(known) :][:1]
        return [*ahead, 5] if len(known) % 3 == 0 else []

    engine = make_engine(checkpoint, "triton", ScriptedDrafter(guess))
    if device == "cpu":
        engine._graphs = DecodeGraphs(engine._runner, engine.cache, 5, "triton", FakeCapture(), most_drafts=2)
    for text, plain in zip(run(engine, drafts=2), expected, strict=True):
        assert text[: len(plain)] == plain
    assert engine._graphs is not None and "drafts" in {kind for _, kind in engine._graphs._graphs}


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)] if ON_GPU else ["cpu"])
def test_grammars_mask_the_same_tokens(checkpoint: Path, device: str) -> None:
    """Of drafts too, which are judged in one case."""
    letters = Letters()
    grammar = Grammar("regex", LLMatcher.grammar_from_regex("([A-F]{1,2}[x-z])*"))

    def bound(backend: Backend, drafter: Drafter | None = None) -> list[list[int]]:
        engine = make_engine(checkpoint, backend, drafter)
        engine.sampler.grammars.tokenizer = LLTokenizer(TokenizerWrapper(letters), n_vocab=97, eos_token=[96])
        return run(engine, 2 if drafter else 0, grammar)

    expected = bound("reference")
    for ids in expected[1:]:
        assert len(ids) >= 4 and {letters.tokens[i].decode() for i in ids} <= {*"ABCDEFxyz"}
    assert expected[0] == run(make_engine(checkpoint, "reference"))[0]
    rows = torch.randn(97, 97, generator=torch.Generator().manual_seed(3))
    drawn, reference = (bound(backend, SamplingDrafter(lambda known: rows[known[-1]])) for backend in BACKENDS)
    assert drawn == reference and drawn[3][: len(expected[3])] == expected[3]


class Letters:
    """A tokenizer of one character a token, and an end token."""

    def __init__(self) -> None:
        self.eos_token_id, self.bos_token_id, self.special_token_ids = 96, None, [96]
        self.tokens = [bytes([i + 33]) for i in range(96)] + [b"<end>"]

    def __call__(self, text: bytes) -> list[int]:
        return [byte - 33 for byte in text if 33 <= byte < 129]


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)] if ON_GPU else ["cpu"])
def test_trees_change_no_token(checkpoint: Path, device: str, graphs: bool) -> None:
    """A step with a tree, and one on what it left in the cache."""
    prompt = PROMPTS[1]
    harness = Harness(make_engine(checkpoint, "reference"))
    text = [*prompt, *harness.generate(harness.add(0, prompt, PARAMS[1]), 8)]

    def tree(slot: int, known: list[int], limit: int) -> list[tuple[int, int]]:
        first, second = text[len(known) :][:2]
        return [(-1, (first + 1) % 97), (-1, first), (1, (second + 1) % 97), (1, second)]

    engine, capture = make_engine(checkpoint, "triton", TreeDrafter(tree)), FakeCapture()
    if device == "cpu" and graphs:
        engine._graphs = DecodeGraphs(engine._runner, engine.cache, 1, "triton", capture, most_drafts=4)
    harness = Harness(engine, drafts=4)
    sequence = harness.add(0, prompt, PARAMS[1])
    for known in (2, 5, 8):
        assert sequence.tokens == text[:known]
        harness.step([(sequence, len(sequence.tokens) - sequence.computed)])
    assert [output.branched for output in sequence.outputs] == [2, 2, 2]
    assert device == "cuda" or capture.replayed == (2 + capture.captured) * graphs


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)] if ON_GPU else ["cpu"])
def test_judged_proposals_give_the_references_tokens(checkpoint: Path, device: str) -> None:
    """Tokens drawn from a draft's distributions, of cut and whole rows, beside a greedy and a penalised one."""
    table = torch.randn(997, generator=torch.Generator().manual_seed(1))

    def texts(backend: Backend) -> list[list[int]]:
        engine = make_engine(checkpoint, backend)
        vocab = engine.spec.vocab_size
        drafter = SamplingDrafter(lambda known: (table[known[-1] :][:vocab] * 2).to(device))
        engine.draft_with(drafter, EngineConfig(model="tiny"))
        harness = Harness(engine, drafts=2)
        params = [SamplingParams(temperature=0.0), SamplingParams(temperature=1.5), SamplingParams(top_p=0.8, top_k=50)]
        params.append(SamplingParams(temperature=0.9, frequency_penalty=0.9, logprobs=2))
        sequences = [harness.add(i, p, params[i], seed=i) for i, p in enumerate(PROMPTS)]
        for _ in range(5):
            harness.step([(s, len(s.tokens) - s.computed) for s in sequences])
        return [sequence.output_ids for sequence in sequences]

    assert texts("triton") == texts("reference")


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)] if ON_GPU else ["cpu"])
@pytest.mark.parametrize(("own", "drafts"), [("triton", 0), ("triton", 2), ("xformers", 0)])
def test_masses_come_from_the_kernel(
    checkpoint: Path, device: str, own: Backend, drafts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks and decodes, with drafts the rows that stay: what H2O adds up is what torch recomputes."""

    def masses(backend: Backend) -> list[torch.Tensor]:
        drafter = ScriptedDrafter(lambda slot, known: [known[-1], 5]) if drafts else None
        engine = make_engine(checkpoint, backend, drafter)
        harness = Harness(engine, drafts=drafts)
        prune = PruneParams(policy="h2o", keep=0.5, window=2, sinks=1, floor=4)
        sequences = [harness.add(i, p, seed=i, prune=prune if i else None) for i, p in enumerate(PROMPTS[:3])]
        for count in (5, 4, 3):
            harness.step([(s, min(count, len(s.tokens) - s.computed)) for s in sequences if s.computed < len(s.tokens)])
        seen = engine._pruner._seen
        return [seen[s.slot].mass[layer][:, : s.computed].cpu() for s in sequences[1:] for layer in range(2)]

    expected = masses("reference")
    monkeypatch.setattr("quire.engine.observe.attention_columns", None)  # a GPU has no need of it
    for result, other in zip(masses(own), expected, strict=True):
        torch.testing.assert_close(result, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)] if ON_GPU else ["cpu"])
@pytest.mark.parametrize("own", TRITON_BACKENDS)
def test_bounds_of_pages_come_from_the_kernel(
    checkpoint: Path, device: str, own: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QuestSelector, "dense_layers", 1)  # of the two that there are

    def bounds(backend: Backend) -> torch.Tensor:
        engine = make_engine(checkpoint, backend)
        harness = Harness(engine)
        prune = PruneParams(policy="quest", keep=0.2, window=2, sinks=1, floor=4)
        sequence = harness.add(0, PROMPTS[0] * 2, seed=0, prune=prune)
        for count in (22, 1, 1, 1, 1):
            harness.step([(sequence, count)])
        found = engine._selection._bounds
        assert found is not None
        return found[engine.cache.page_table[0, 1, :, :6].long()].cpu()

    expected = bounds("reference")
    monkeypatch.setattr("quire.engine.page_selection.page_key_bounds", None)
    assert expected.any(-1).all()
    torch.testing.assert_close(bounds(own), expected, rtol=1e-4, atol=1e-4)
