"""Steps of decodes by one call of a kernel: the tokens, entries and counts of steps that are put together in Python."""

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from quire.core.config import EngineConfig
from quire.core.ids import SlotId
from quire.core.model_spec import ModelSpec
from quire.core.plan import NO_TOKEN, BatchPlan, Decodes
from quire.core.pruning import PruneParams
from quire.core.request import Grammar, SamplingParams
from quire.engine.engine import Engine
from quire.engine.grammar import Grammars
from quire.kernels.backend import resolve_backend
from quire.models.native import NativeRunner
from quire.models.native_layers import Decoder, LayerShape, TokenWeights
from quire.models.placement import Placement
from quire.models.rope import RopeKind, RopeSettings, RotaryEmbedding

from .harness import Harness, Sequence, in_columns
from .scripted import SamplingDrafter, ScriptedDrafter

VOCAB, LENGTH = 48, 100
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(resolve_backend(CPU, torch.float32) != "cpu", reason="needs the C++ kernels")

UNALTERED = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.9),
    SamplingParams(temperature=1.2, top_p=0.8),
    SamplingParams(temperature=0.7, top_k=5, min_p=0.1),
]
ALTERED = [
    SamplingParams(temperature=0.8, repetition_penalty=1.3),
    SamplingParams(temperature=0.0, logit_bias={3: 2.0}),
    SamplingParams(temperature=0.0, min_tokens=6, stop_token_ids=(1, 2, 3)),
]


def make_engine(dtype: torch.dtype = torch.float32, rope: RopeKind = "default") -> Engine:
    """An engine over a random decoder with two sliding-window layers of three."""
    place = Placement(CPU, dtype, resolve_backend(CPU, dtype))
    windows = (None, 6, 6)
    shape = LayerShape(32, 48, 4, 2, 8, 1e-6, True, False, False, True)
    decoder = Decoder(shape, F.silu, windows, TokenWeights.fresh(VOCAB, 32, False, place), place)
    generator = torch.Generator().manual_seed(0)
    for weight in decoder.parameters():
        weight.normal_(0.0, 0.4, generator=generator)
    spec = ModelSpec(
        name="random", architecture="Qwen3ForCausalLM", num_layers=3, num_kv_heads=2, num_heads=4, head_dim=8,
        vocab_size=VOCAB, max_context=LENGTH, windows=windows, eos_token_ids=(),
    )  # fmt: skip
    rotary = RotaryEmbedding(RopeSettings(rope, 1e4, 8, 16, 16, {"factor": 4.0}), CPU)
    config = EngineConfig(model="random", page_size=4, max_num_seqs=6, max_batch_tokens=64)
    return Engine(NativeRunner(spec, decoder, rotary), config, "native", place)


def run(engine: Engine, kinds: list[SamplingParams], count: int = 20) -> tuple[list[list[int]], torch.Tensor]:
    """Sequences that join one by one, in odd slots, and decode together; their tokens, and kept lengths at the end."""
    harness = Harness(engine, drop_windows=True)
    sequences: list[Sequence] = []
    for index, params in enumerate(kinds):
        sequences.append(harness.add((4, 1, 3, 0, 5)[index], [7, 1, 4, 1, 5][: index + 1], params, seed=index))
        harness.step([(sequences[-1], index + 1)])
        harness.step([(sequence, 1) for sequence in reversed(sequences)])
    while open_ := [s for s in sequences if len(s.output_ids) < count + s.seed]:
        harness.step([(sequence, 1) for sequence in open_])
    return [sequence.output_ids for sequence in sequences], engine.cache.kept.clone()


def counting(engine: Engine) -> list[int]:
    """Sizes of the steps that one call computes, as they come."""
    compute, sizes = engine._decode_step, list[int]()
    assert compute is not None
    original = compute._call

    def call(*arguments: object) -> int:
        sizes.append(compute._rows.count)
        return int(original(*arguments))

    compute._call = call  # type: ignore[assignment]
    return sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kinds", [UNALTERED, [*UNALTERED[:2], *ALTERED]])
def test_one_call_gives_the_tokens_of_many(kinds: list[SamplingParams], known: bool, dtype: torch.dtype) -> None:
    """Past windows and ends of pages, beside rows that others must choose for, and for tokens only the engine knows."""
    engine, plain = make_engine(dtype), make_engine(dtype)
    in_columns(engine, known)
    sizes = counting(engine)
    tokens, kept = run(engine, kinds)
    plain._decode_step = None
    expected, expected_kept = run(plain, kinds)
    assert tokens == expected and len({tuple(ids[:8]) for ids in tokens}) > 1
    assert torch.equal(kept, expected_kept)
    assert np.array_equal(engine.cache.computed, plain.cache.computed)
    assert {*sizes} == {*range(1, len(kinds) + 1)} and len(sizes) > 20


def test_known_tokens_come_along() -> None:
    """Several of one sequence in the same call: past windows and pages, closing up, with an unknown one beside them."""
    told = []
    for whole in (True, False):
        engine = make_engine()
        sizes = counting(engine)
        engine._decode_step = engine._decode_step if whole else None
        engine.sampler.grammars.binds = lambda slot: True  # type: ignore[method-assign]
        harness = Harness(engine)
        sequences = [harness.add(s, [7 + s], params, s) for s, params in zip((4, 1, 3), UNALTERED, strict=False)]
        harness.step([(sequence, 1) for sequence in sequences])
        engine.cache.closes_up[1] = True
        for counts in ((9, 3, 1), (1, 14, 2), (1, 1, 1)):
            for sequence, count in zip(sequences, counts, strict=True):
                sequence.tokens += [(5 * i + count) % VOCAB for i in range(count - 1)]
            harness.step(list(zip(sequences, counts, strict=True)))
        pages = [engine.cache.page_table[s.slot, :, :, :5].long() for s in sequences]
        told.append(
            ([s.tokens for s in sequences], [engine.cache.pool[table] for table in pages], engine.cache.computed)
        )
        assert sizes == ([3] * 3 if whole else [])
    assert told[0][0] == told[1][0] and np.array_equal(told[0][2], told[1][2])
    assert all(torch.equal(*pair) for pair in zip(told[0][1], told[1][1], strict=True))


@pytest.mark.parametrize("kinds", [UNALTERED, [*UNALTERED[:2], *ALTERED]])
def test_drafts_are_verified_on_what_the_call_gives(kinds: list[SamplingParams]) -> None:
    """Right, wrong and too few, of some sequences and others, past windows and pages: as without drafts, and as where
    Python puts steps together, to the cache's last entry."""
    text = run(make_engine(), kinds, 40)[0]
    told = []

    def guess(slot: int, known: list[int]) -> list[int]:
        index = (4, 1, 3, 0, 5).index(slot)
        start = len(known) - 1 - index
        right = text[index][start : start + len(known) % 4]
        return [*right, (right[-1] if right else 0) + 1] if len(known) % 3 else right

    for whole, columns in ((True, False), (True, True), (False, True), (False, False)):
        engine = make_engine()
        sizes = counting(engine)
        engine._decode_step = engine._decode_step if whole else None
        if columns:
            in_columns(engine, known=True)

        engine.draft_with(ScriptedDrafter(guess), EngineConfig(model="random", draft="ngram", draft_tokens=4))
        harness = Harness(engine, drop_windows=True, drafts=4)
        sequences = [harness.add((4, 1, 3, 0, 5)[i], [7, 1, 4, 1, 5][: i + 1], p, i) for i, p in enumerate(kinds)]
        outputs = harness.step([(sequence, sequence.seed + 1) for sequence in sequences])
        while open_ := [sequence for sequence in sequences if len(sequence.output_ids) < 25]:
            outputs += harness.step([(sequence, 1) for sequence in open_])
        assert all(ids[:25] == s.output_ids[:25] for ids, s in zip(text, sequences, strict=True))
        assert {len(output.token_ids) for output in outputs} >= {1, 2, 3, 4} and (len(sizes) > 5) == whole
        told.append((engine.cache.kept.clone(), engine.cache.computed.copy(), [s.output_ids for s in sequences]))
    for kept, computed, ids in told[1:]:
        assert torch.equal(kept, told[0][0]) and np.array_equal(computed, told[0][1]) and ids == told[0][2]


@pytest.mark.parametrize("bias", [0.0, 0.5])
def test_drawn_proposals_are_judged_by_the_call_as_elsewhere(bias: float) -> None:
    """From the target's own distribution and from another, beside who is greedy and who has a seed."""
    kinds = [*UNALTERED, SamplingParams(temperature=0.9, seed=5)]
    told = []
    for whole in (True, False):
        engine = make_engine()
        engine._decode_step = engine._decode_step if whole else None
        in_columns(engine, known=True)
        dice = torch.Generator().manual_seed(2)
        scores = 4 * torch.randn(VOCAB, VOCAB, generator=dice)
        drafter = SamplingDrafter(lambda known, scores=scores: bias * scores[known[-1]])  # type: ignore[misc]
        engine.draft_with(drafter, EngineConfig(model="random", draft="ngram", draft_tokens=3))
        harness = Harness(engine, drafts=3)
        sequences = [harness.add(i, [7, 1, 4], params, i) for i, params in enumerate(kinds)]
        harness.step([(sequence, 3) for sequence in sequences])
        outputs = []
        for _ in range(12):
            outputs += harness.step([(sequence, 1) for sequence in sequences])
        told.append(([s.output_ids for s in sequences], engine.cache.kept.clone(), engine.sampler.table.newest.clone()))
        assert all(output.model_drafted == output.drafted == 3 for output in outputs)
        assert {len(output.token_ids) for output in outputs} >= {1, 2}
    assert told[0][0] == told[1][0] and all(torch.equal(*pair) for pair in zip(told[0][1:], told[1][1:], strict=True))


def test_who_a_proposal_led_astray_is_computed_anew() -> None:
    """One whose values are not finite: its sequence goes on as without, and the others of the call do."""
    text = run(make_engine(), UNALTERED[:2], 20)[0]
    poison = max({*range(8, VOCAB)} - {*text[0], *text[1]})

    def guess(slot: int, known: list[int]) -> list[int]:
        index = (4, 1).index(slot)
        right = text[index][len(known) - 1 - index :][:1]
        return [*right, poison, 3] if slot == 4 else [*right, 5]

    engine = make_engine()
    assert isinstance(engine._runner, NativeRunner)
    engine._runner.decoder.embedding.data[poison] = float("nan")
    sizes = counting(engine)
    in_columns(engine, known=True)
    engine.draft_with(ScriptedDrafter(guess), EngineConfig(model="random", draft="ngram", draft_tokens=3))
    harness = Harness(engine, drop_windows=True, drafts=3)
    sequences = [harness.add((4, 1)[i], [7, 1][: i + 1], params, i) for i, params in enumerate(UNALTERED[:2])]
    harness.step([(sequence, sequence.seed + 1) for sequence in sequences])
    for _ in range(6):
        outputs = harness.step([(sequence, 1) for sequence in sequences])
        assert [output.error for output in outputs] == [None, None] and outputs[0].drafted == 3
    assert all(ids[: len(s.output_ids)] == s.output_ids for ids, s in zip(text, sequences, strict=True))
    assert len(sequences[0].output_ids) < len(sequences[1].output_ids) and 1 in sizes
    assert torch.isfinite(engine.cache.pool).all()


class Letters:
    """A tokenizer of one letter a token, as llguidance takes it."""

    def __init__(self) -> None:
        self.eos_token_id, self.bos_token_id, self.special_token_ids = 0, None, [0]
        self.tokens = [b"<end>", *(chr(64 + i).encode() for i in range(1, VOCAB))]

    def __call__(self, text: bytes) -> list[int]:
        return [character - 64 for character in text]


@pytest.mark.parametrize("kinds", [UNALTERED, [*UNALTERED[:2], *ALTERED]])
def test_grammars_mask_rows_of_the_call(kinds: list[SamplingParams], monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a free sequence, with and without tokens that are forced, to the end of each grammar; once in a step, also
    where the call leaves the draw to others."""
    told, made, fill = [], list[int](), Grammars.fill

    def counted(grammars: Grammars, walks: Any, count: int) -> Any:
        made.append(count)
        return fill(grammars, walks, count)

    monkeypatch.setattr(Grammars, "fill", counted)
    for whole in (True, False):
        engine = make_engine()
        sizes = counting(engine)
        if whole:
            in_columns(engine, known=True)
        else:
            engine._decode_step = None
        engine.sampler.grammars.tokenizer = LLTokenizer(TokenizerWrapper(Letters()), n_vocab=VOCAB, eos_token=[0])
        harness = Harness(engine)
        sources = ["([A-C]{2}[X-Z])*", "([A-D]XY[E-G]){3}", "[A-Z]{9}Z", "[ABC]*", "Q{5}[A-F]"]
        grammars = [Grammar("regex", LLMatcher.grammar_from_regex(source)) for source in sources]
        sequences = [
            harness.add((4, 1, 3, 0, 5)[i], [7, 1], params, i, grammar=grammars[i] if i else None)
            for i, params in enumerate(kinds)
        ]
        for _ in range(16):
            open_ = [s for s in sequences if not (s.outputs and s.outputs[-1].ended)]
            made.clear()
            harness.step([(s, len(s.tokens) - s.computed) for s in open_])
            assert made in ([], [sum(s in open_ for s in sequences[1:])])
        told.append([s.output_ids for s in sequences])
        assert bool(sizes) == whole and not any(output.error for s in sequences for output in s.outputs)
        for source, sequence in zip(sources[1:], sequences[1:], strict=False):
            text = "".join(Letters().tokens[i].decode() for i in sequence.output_ids).removesuffix("<end>")
            assert re.fullmatch(source, text) or not sequence.outputs[-1].ended
    assert told[0] == told[1]


def test_angles_are_found_when_a_position_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.models.rope._LEAST_TABLE", 1)
    engine = make_engine()
    in_columns(engine, known=True)
    sizes = counting(engine)
    assert run(engine, UNALTERED, count=40)[0] == run(make_engine(), UNALTERED, count=40)[0]
    assert len(sizes) > 40, "who lacks angles is asked again"


def test_angles_that_depend_on_a_length_are_computed_elsewhere() -> None:
    engine = make_engine(rope="dynamic")
    assert engine._decode_step is None
    in_columns(engine, known=True)
    assert run(engine, UNALTERED)[0] == run(make_engine(rope="dynamic"), UNALTERED)[0]


def decoding(engine: Engine, *slots: int) -> None:
    """Sequences in these slots whose prompts are computed, with room for more tokens."""
    harness = Harness(engine)
    for slot in slots:
        harness.step([(harness.add(slot, [5, 6 + slot]), 2)])


def columns(*rows: tuple[int, int, int]) -> BatchPlan:
    """(slot, start, token) each."""
    return BatchPlan((), decodes=Decodes(*np.array(rows, np.int32).T))


def test_who_closes_up_is_rotated_to_its_place_in_the_cache() -> None:
    """The keys of a sequence at position 30 that holds two entries."""
    told = []
    for whole, closes_up in ((False, True), (True, True), (True, False)):
        engine = make_engine()
        decoding(engine, 1)
        engine.cache.closes_up[1] = closes_up
        engine._decode_step = engine._decode_step if whole else None
        engine.step(columns((1, 30, 9)))
        pages = engine.cache.page_table[1, :, :, 0].long()
        told.append(engine.cache.pool[pages, 0, 2])
    assert torch.equal(told[0], told[1]) and not torch.equal(told[0], told[2])


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    engine, plain = make_engine(), make_engine()
    for one in (engine, plain):
        decoding(one, 0, 2)
    for one in (engine, plain):
        one._runner.decoder.embedding[11] = torch.nan  # type: ignore[attr-defined]
    for params in (UNALTERED[0], UNALTERED[1], ALTERED[0]):
        engine.sampler.table.strengths[2, 0] = params.temperature
        engine.sampler.table.unaltered[0] = params is not ALTERED[0]
        output = engine.step(columns((0, 2, 9), (2, 2, 11)))
        assert output.decoded[0] != NO_TOKEN and output.decoded[1] == NO_TOKEN
        engine.cache.wipe(SlotId(2), 1)
        engine.cache.kept[0] -= 1
        engine.cache.kept[2] -= 1
    engine._decode_step = None
    assert engine.step(columns((0, 2, 9))).decoded[0] == output.decoded[0]


def test_an_id_that_is_no_token_changes_nothing() -> None:
    engine = make_engine()
    decoding(engine, 0, 1)
    before = engine.cache.kept.clone()
    with pytest.raises(IndexError, match="not below 48"):
        engine.step(columns((0, 2, 9), (1, 2, VOCAB)))
    assert torch.equal(engine.cache.kept, before)


def test_who_is_looked_at_is_not_computed_in_one_call() -> None:
    engine = make_engine()
    sizes = counting(engine)
    harness = Harness(engine)
    prune = PruneParams(policy="h2o", keep=0.5, window=2, sinks=1, floor=4)
    harness.step([(harness.add(0, [5, 6], prune=prune), 2), (harness.add(1, [5, 6]), 2)])
    engine.step(columns((0, 2, 9), (1, 2, 9)))
    assert not sizes
