"""Outputs bound to grammars: the distribution is the masked one, whatever is drafted; all others are untouched."""

import itertools
import re
from collections import Counter
from dataclasses import replace as replaced
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from msgspec.structs import replace
from scipy import stats

from quire.core.errors import InvalidRequestError
from quire.core.ids import SlotId
from quire.core.plan import SequenceOutput, SlotAssignment
from quire.core.pruning import PruneParams
from quire.core.request import Grammar, SamplingParams
from quire.engine.engine import Engine
from quire.engine.grammar import Grammars
from quire.kernels import sampling
from quire.speculation.drafter import Drafter

from ..server.conftest import byte_level_backend
from .harness import Harness, Sequence, make_engine
from .scripted import BranchingDrafter, SamplingDrafter, ScriptedDrafter
from .test_speculative_sampling import DRAFTS, EOS, FIRST, TARGET, VOCAB, Bigrams, next_token

PIECES = ["<end>", "a", "b", "c", "ab"]
PATTERN = r"((ab?c|b){1,2}a?)+"
RUN, SEQUENCES = 4, 2500


class Pieces:
    """A tokenizer of five tokens, as llguidance takes it."""

    def __init__(self) -> None:
        self.eos_token_id, self.bos_token_id, self.special_token_ids = EOS, None, [EOS]
        self.tokens = [piece.encode() for piece in PIECES]

    def __call__(self, text: bytes) -> list[int]:
        return [PIECES.index(character) for character in text.decode() if character in PIECES]


def regex(pattern: str) -> Grammar:
    return Grammar("regex", LLMatcher.grammar_from_regex(pattern))


def bound_engine(drafter: Drafter | None = None, **settings: int) -> Engine:
    """Bigrams, whose tokens are the `PIECES`."""
    sizes = {"max_num_seqs": 4, "max_batch_tokens": 64, "page_size": 16, "max_model_len": 40} | settings
    engine = make_engine(Bigrams(), drafter, **sizes)
    engine.sampler.grammars.tokenizer = LLTokenizer(TokenizerWrapper(Pieces()), n_vocab=VOCAB, eos_token=[EOS])
    return engine


WORDS = ["".join(word) for n in range(9) for word in itertools.product("abc", repeat=n)]


@cache
def begins(pattern: str) -> frozenset[str]:
    """All that words of up to eight letters which match the pattern begin with."""
    return frozenset(w[:n] for w in WORDS if re.fullmatch(pattern, w) for n in range(len(w) + 1))


def allowed(known: list[int], token: int) -> bool:
    """By trying out all words, no parser."""
    text = "".join(PIECES[i] for i in known)
    return bool(re.fullmatch(PATTERN, text)) if token == EOS else text + PIECES[token] in begins(PATTERN)


def run(harness: Harness, sequences: list[Sequence], count: int) -> None:
    """Until each has so many tokens or is at its end."""
    while open_ := [s for s in sequences if len(s.output_ids) < count and not over(s)]:
        harness.step([(s, len(s.tokens) - s.computed) for s in open_])


def over(sequence: Sequence) -> bool:
    return bool(sequence.outputs) and (sequence.outputs[-1].ended or sequence.outputs[-1].error is not None)


def p_value(params: SamplingParams, runs: list[tuple[int, ...]]) -> float:
    """Chi-square over all runs of `RUN` tokens, or up to an end; rare ones taken together."""
    counts, sizes = Counter(runs), [0.0, 0.0]
    expected, seen = list[float](), list[int]()
    open_: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    while open_:
        known, chance = open_.pop()
        if len(known) < RUN and EOS not in known:
            following = next_token(params, list(known), allowed)
            open_ += [((*known, token), chance * p) for token, p in enumerate(following) if p > 0]
        elif chance * len(runs) < 5:
            sizes = [sizes[0] + chance * len(runs), sizes[1] + counts.pop(known, 0)]
        else:
            expected.append(chance * len(runs))
            seen.append(counts.pop(known, 0))
    assert not counts, "something that is not allowed was generated"
    return float(stats.chisquare([*seen, sizes[1]], [*expected, sizes[0]]).pvalue)


CASES: dict[str, tuple[dict[str, Any], Drafter | None]] = {
    "alone": ({}, None),
    "alone, cut": ({"top_p": 0.8, "temperature": 1.5}, None),
    "drawn, good": ({}, SamplingDrafter(lambda known: DRAFTS["good"][known[-1]])),
    "drawn, bad": ({"frequency_penalty": 0.8}, SamplingDrafter(lambda known: DRAFTS["bad"][known[-1]])),
    "drawn, senseless": ({}, SamplingDrafter(lambda known: DRAFTS["senseless"][known[-1]])),
    "drawn, cut": ({"top_k": 2}, SamplingDrafter(lambda known: DRAFTS["other"][known[-1]])),
    "drawn, at least": ({"min_tokens": 3}, SamplingDrafter(lambda known: DRAFTS["good"][known[-1]])),
    "coupled": ({"seed": 1}, SamplingDrafter(lambda known: DRAFTS["good"][known[-1]])),
    "points": ({}, ScriptedDrafter(lambda slot, known: [1, 3, slot % VOCAB])),
    "trees": ({}, BranchingDrafter(SamplingDrafter(lambda known: DRAFTS["good"][known[-1]]), VOCAB)),
}


@pytest.mark.parametrize("case", CASES)
def test_runs_follow_the_masked_distribution(case: str) -> None:
    settings, drafter = CASES[case]
    params = SamplingParams(**settings)
    drafts = 0 if drafter is None else 3
    engine = bound_engine(drafter, max_num_seqs=SEQUENCES, max_batch_tokens=8 * SEQUENCES)
    harness = Harness(engine, drafts=drafts)
    grammar = regex(PATTERN)
    sequences = [harness.add(s, [FIRST], params, seed=s * 977 + 5, grammar=grammar) for s in range(SEQUENCES)]
    run(harness, sequences, RUN)
    outputs = [output for sequence in sequences for output in sequence.outputs]
    assert p_value(params, [tuple(sequence.output_ids[:RUN]) for sequence in sequences]) > 1e-3
    if drafts:
        assert any(len(output.token_ids) > 1 for output in outputs) or case == "drawn, senseless"
        assert any(len(output.token_ids) <= output.drafted for output in outputs)


def test_a_draft_is_masked_too() -> None:
    """One that says what the target says is always right then."""
    engine = bound_engine(SamplingDrafter(lambda known: TARGET[known[-1]]), max_num_seqs=200, max_batch_tokens=800)
    harness = Harness(engine, drafts=1)
    sequences = [harness.add(s, [FIRST], SamplingParams(), s, grammar=regex("((ab?c|b)b)*a")) for s in range(200)]
    run(harness, sequences, RUN)
    verified = [output for sequence in sequences for output in sequence.outputs if output.drafted]
    assert len(verified) > 200 and all(len(output.token_ids) == 2 or output.ended for output in verified)


@pytest.mark.parametrize("case", ["alone", "drawn, good", "points", "coupled"])
def test_forced_tokens_change_nothing(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of seeded sequences, with penalties that count them; drawn freely they are judged above."""
    grammar = regex("((a|c)(bab|cc)(ba){2}|b{3}c)+")
    told = []
    for most in (32, 2, 0):
        monkeypatch.setattr("quire.engine.grammar.MAX_FORCED_TOKENS", most)
        drafter = CASES[case][1]
        harness = Harness(bound_engine(drafter, max_num_seqs=40, max_batch_tokens=400), drafts=3 if drafter else 0)
        kinds = [SamplingParams(seed=1), SamplingParams(seed=1, frequency_penalty=1.5), SamplingParams(temperature=0.0)]
        sequences = [harness.add(s, [FIRST], kinds[s % 3], seed=s, grammar=grammar) for s in range(40)]
        run(harness, sequences, 12)
        told.append([sequence.output_ids[:12] for sequence in sequences])
        forced = [len(output.forced) for sequence in sequences for output in sequence.outputs]
        assert max(forced) == most if most < 3 else max(forced) > 3
    assert told[0] == told[1] == told[2] and len({tuple(ids) for ids in told[0]}) > 10


def test_nothing_is_forced_on_who_wants_to_hear_of_every_token() -> None:
    engine = bound_engine()
    wants: list[dict[str, Any]] = [
        {"params": SamplingParams(logprobs=0)}, {"record": True}, {"prune": PruneParams(policy="window")}, {},
    ]  # fmt: skip
    for slot, want in enumerate(wants):
        given = {"params": SamplingParams()} | want
        assignment = SlotAssignment(
            SlotId(slot), given.pop("params"), 0, (), (FIRST,), (), 99, grammar=regex("ab*c{3}")
        )
        engine.sampler.grammars.assign(replaced(assignment, **given))
        step = engine.sampler.grammars.take(slot, [1, 3])
        assert (step.forced, step.ended) == (((3, 3), True) if slot == 3 else ((), False))


def said(grammar: Grammar | None, count: int = 12, **params: Any) -> Sequence:
    harness = Harness(bound_engine())
    sequence = harness.add(0, [FIRST], SamplingParams(**params), 3, grammar=grammar)
    run(harness, [sequence], count)
    return sequence


def last(sequence: Sequence) -> SequenceOutput:
    return sequence.outputs[-1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_ends_with_its_grammar(temperature: float) -> None:
    sequence = said(regex("(a|c)bab"), temperature=temperature)
    text = "".join(PIECES[i] for i in sequence.output_ids)
    assert text in ("abab", "cbab") and last(sequence).ended


def test_end_tokens_are_held_back_but_where_nothing_else_is_left() -> None:
    for params in ({"min_tokens": 3}, {"ignore_eos": True}):
        bias = {EOS: 100.0}
        assert said(regex("b*"), logit_bias=bias).output_ids == [EOS]
        ids = said(regex("b*"), logit_bias=bias, **params).output_ids
        assert ids[:3] == [PIECES.index("b")] * 3
        assert (ids[3:] == [EOS]) == ("min_tokens" in params)
        # The grammar ends sooner: so does the output.
        sequence = said(regex("b?"), logit_bias=bias, **params)
        assert sequence.output_ids == [PIECES.index("b")] and last(sequence).ended
    empty = said(regex(""), min_tokens=2)
    assert empty.output_ids == [EOS] and last(empty).ended


def test_who_comes_back_goes_on_where_it_was() -> None:
    grammar, params = regex(PATTERN + "c"), SamplingParams(seed=4, temperature=1.3)
    whole = said(grammar, seed=4, temperature=1.3)
    for count in range(1, len(whole.output_ids)):
        harness = Harness(bound_engine())
        again = harness.add(0, [FIRST], params, 3, output=tuple(whole.output_ids[:count]), grammar=grammar)
        run(harness, [again], 12)
        assert again.output_ids == whole.output_ids


def test_a_slot_forgets_its_grammar() -> None:
    harness = Harness(bound_engine())
    bound = harness.add(0, [FIRST], grammar=regex("c{30}"))
    run(harness, [bound], 3)
    assert bound.output_ids[:3] == [PIECES.index("c")] * 3
    harness.release(bound)
    free = harness.add(0, [FIRST])
    run(harness, [free], 3)
    assert free.output_ids == said(None, 3, temperature=0.0).output_ids


@pytest.mark.parametrize("fault", ["does not compile", "was not followed", "no token fits", "but the end"])
def test_what_goes_wrong_ends_one_sequence(fault: str) -> None:
    engine = bound_engine(SamplingDrafter(lambda known: DRAFTS["good"][known[-1]]))
    grammar = regex({"does not compile": "(", "was not followed": "c*"}.get(fault, "x"))
    harness = Harness(engine, drafts=2)
    params = SamplingParams(temperature=0.0, logit_bias={EOS: 100.0} if fault == "but the end" else {})
    broken = harness.add(0, [FIRST], params, output=(1,) if fault == "was not followed" else (), grammar=grammar)
    others = [harness.add(1, [FIRST], seed=1, grammar=regex("b{9}")), harness.add(2, [FIRST, 1], SamplingParams(), 1)]
    run(harness, [broken, *others], 6)
    assert last(broken).error and not last(broken).token_ids and not last(broken).ended
    assert others[0].output_ids[:6] == [2] * 6 and len(others[1].output_ids) >= 6


def test_neighbours_are_not_touched() -> None:
    kinds = [SamplingParams(temperature=0.0, logprobs=3), SamplingParams(seed=3), SamplingParams(top_p=0.7, seed=1)]

    def neighbours(grammar: Grammar | None) -> list[Any]:
        harness = Harness(bound_engine(ScriptedDrafter(lambda slot, known: [1, 2])), drafts=2)
        sequences = [harness.add(s, [FIRST, s], kind, s) for s, kind in enumerate(kinds)]
        more = [harness.add(3, [FIRST], SamplingParams(seed=9), 9, grammar=grammar)] if grammar else []
        for _ in range(5):
            open_ = [s for s in (*sequences, *more) if s in sequences or not over(s)]
            harness.step([(s, len(s.tokens) - s.computed) for s in open_])
        return [[(o.token_ids, o.logprobs, o.error) for o in s.outputs] for s in sequences]

    assert neighbours(regex(PATTERN)) == neighbours(None)


def test_log_probabilities_are_the_models_own() -> None:
    outputs = said(regex("c{3}"), temperature=0.0, logprobs=1).outputs
    for before, output in zip([FIRST, 3, 3], outputs, strict=True):
        (entry,) = output.logprobs
        assert entry.logprob == pytest.approx(float(TARGET[before].log_softmax(0)[3]), abs=1e-5)


def test_compiled_grammars_are_kept_and_faults_told_again() -> None:
    grammars = Grammars(VOCAB)
    with pytest.raises(InvalidRequestError, match="no tokenizer"):
        grammars.compile(regex("a"))
    grammars = bound_engine().sampler.grammars
    assert not grammars.knows(regex("a*"))
    assert grammars.compile(regex("a*")) is grammars.compile(regex("a*")) and grammars.knows(regex("a*"))
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match="unclosed group"):
            grammars.compile(regex("(a"))
    assert grammars.counts().compiled == 2
    wanted = regex("b*")
    grammars.compile(wanted)
    for number in range(80):
        grammars.compile(regex(f"a{{{number + 1}}}"))
    assert not grammars.knows(regex("a*")), "whose request is gone"
    assert grammars.knows(wanted) and len(grammars._compiled) == 64
    del wanted
    for number in range(80):
        grammars.compile(regex(f"c{{{number + 1}}}"))
    assert not grammars.knows(regex("b*")) and grammars.counts().compiled == 163


def test_what_takes_too_much_is_refused_before_it_runs() -> None:
    grammars = bound_engine().sampler.grammars
    for pattern, why in (("(a{1000}){1000}", "no choice"), ("c{40000}", "no choice"), ("c{9000}", "")):
        if why:
            with pytest.raises(InvalidRequestError, match=why):
                grammars.compile(regex(pattern))
        else:
            grammars.compile(regex(pattern))


def test_tokenizers_are_read_or_the_reason_is_told(tmp_path: Path) -> None:
    grammars = Grammars(VOCAB)
    for content, why in ((None, "tokenizer.json"), ("{}", "this model's tokenizer")):
        if content is not None:
            (tmp_path / "tokenizer.json").write_text(content)
        grammars.read(tmp_path, Bigrams.spec)
        with pytest.raises(InvalidRequestError, match=why):
            grammars.compile(regex("a"))
        assert grammars.knows(regex("a"))


@pytest.mark.parametrize("vocab", [300, 310, 325])
def test_logits_may_be_narrower_or_wider_than_the_vocabulary(tmp_path: Path, vocab: int) -> None:
    byte_level_backend().save(str(tmp_path / "tokenizer.json"))
    grammars = Grammars(vocab)
    grammars.read(tmp_path, replace(Bigrams.spec, vocab_size=vocab, eos_token_ids=(1,)))
    grammars.assign(SlotAssignment(SlotId(0), SamplingParams(), 0, (1,), (5,), (), 99, grammar=regex("(.|\\n)*")))
    masks = grammars.masks([(0, 0, [])], np.array([1], np.int32))
    assert masks is not None
    allowed = np.flatnonzero(np.unpackbits(masks.bits[0], bitorder="little"))
    # Some of the last tokens are parts of characters, which nothing begins with.
    assert 1 in allowed and len(allowed) > 100 and min(vocab, 310) - 12 < allowed.max() < min(vocab, 310)


@pytest.mark.parametrize("width", [5, 8, 37])
def test_bits_say_what_is_forbidden(width: int) -> None:
    bits = np.random.default_rng(width).integers(0, 256, (6, 8), np.uint8)
    wanted = np.array([[not row[t // 8] >> (t % 8) & 1 for t in range(width)] for row in bits])
    assert np.array_equal(sampling.unset_bits(torch.from_numpy(bits), width).numpy(), wanted)
    for rows in ([0, 1, 2, 3, 4, 5], [1, 4, 6, 7, 8, 9]):
        logits = torch.arange(10.0 if len(rows) < max(rows) else 6.0)[:, None].repeat(1, width)
        before = logits.clone()
        sampling.forbid_unset(logits, torch.tensor(rows), torch.from_numpy(bits))
        before[torch.tensor(rows)] = before[torch.tensor(rows)].masked_fill(torch.from_numpy(wanted), -torch.inf)
        assert torch.equal(logits, before)


@pytest.mark.parametrize("drafts", [[[]], [[], []], [[1, 2]], [[], [1, 2, 3], [], [3, 1], [2], [EOS, 1]]])
def test_threads_compute_the_same_masks(drafts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    def masks() -> Any:
        grammars = bound_engine().sampler.grammars
        first = itertools.accumulate((1 + len(tokens) for tokens in drafts), initial=1)  # the first row is nobody's
        walks = [
            (grammars.compile(regex(PATTERN)).deep_copy(), row, tokens)
            for tokens, row in zip(drafts, first, strict=False)
        ]
        return grammars.fill(walks, 1 + sum(1 + len(tokens) for tokens in drafts))

    one = masks()
    monkeypatch.setattr("quire.engine.grammar._MUCH", 0)
    assert np.array_equal(one, masks()) and one[0].any() and (one[1] != one[0]).any()
