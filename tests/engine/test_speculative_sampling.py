"""Whole runs of tokens, proposed and verified, against the exact joint distribution of a toy model."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from quire.core.model_spec import ModelSpec
from quire.core.plan import IntArray
from quire.core.request import SamplingParams
from quire.models.context import AttentionContext
from quire.speculation.drafter import Drafter, Draw, Proposals
from quire.speculation.history import TokenHistory

from .harness import Harness, make_engine
from .scripted import SamplingDrafter, ScriptedDrafter

VOCAB, EOS, FIRST = 5, 0, 2
RUN, SEQUENCES = 3, 2500


def table(seed: int) -> Tensor:
    """[V, V]: logits by the last token."""
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)) * 1.3


TARGET = table(1)
DRAFTS = {
    "good": TARGET + 0.5 * table(2),
    "bad": -TARGET,
    "other": table(3),
    "senseless": torch.full((VOCAB, VOCAB), torch.nan),
}


class Bigrams:
    """`ModelRunner` whose logits are a function of the last token."""

    spec = ModelSpec(
        name="bigrams", architecture="Toy", num_layers=1, num_kv_heads=1, num_heads=1, head_dim=8, vocab_size=VOCAB,
        max_context=64, windows=(None,), eos_token_ids=(EOS,),
    )  # fmt: skip
    rope = None

    def output_weight(self, layer: int) -> Tensor | None:
        return None

    def forward(
        self, input_ids: Tensor, positions: Tensor, lengths: Tensor, context: AttentionContext, logit_rows: Tensor
    ) -> Tensor:
        return TARGET[input_ids[logit_rows]]


def next_token(
    params: SamplingParams, tokens: list[int], allowed: Callable[[list[int], int], bool] = lambda known, token: True
) -> list[float]:
    """Probabilities after the prompt [FIRST] and `tokens`, by the rules one after another in plain Python."""
    logits = TARGET[[FIRST, *tokens][-1]].tolist()
    for i in range(VOCAB):
        if i in (FIRST, *tokens):
            logits[i] *= 1 / params.repetition_penalty if logits[i] > 0 else params.repetition_penalty
        logits[i] -= params.frequency_penalty * tokens.count(i) + params.presence_penalty * (i in tokens)
        logits[i] += params.logit_bias.get(i, 0.0)
    if len(tokens) < params.min_tokens:
        logits[EOS] = -torch.inf
    logits = [logit if allowed(tokens, i) else -torch.inf for i, logit in enumerate(logits)]
    weights = (torch.tensor(logits).double() / params.temperature).softmax(0)
    order = weights.argsort(descending=True).tolist()[: params.top_k or VOCAB]
    kept: list[int] = []
    for i in order:
        if kept and sum(weights[kept]) >= params.top_p * sum(weights[order]):
            break
        kept.append(i)
    kept = [i for i in kept if weights[i] >= params.min_p * weights[order[0]]]
    total = sum(weights[kept])
    return [float(weights[i] / total) if i in kept else 0.0 for i in range(VOCAB)]


def p_value(params: SamplingParams, runs: list[tuple[int, ...]]) -> float:
    """Chi-square over all runs of three tokens, rare ones taken together."""
    rare, seldom, expected, counts = 0.0, 0, [], []
    for run in itertools.product(range(VOCAB), repeat=RUN):
        probability = 1.0
        for place, token in enumerate(run):
            probability *= next_token(params, list(run[:place]))[token]
        count = runs.count(run)
        if probability == 0:
            assert count == 0, run
        elif probability * len(runs) < 5:
            rare, seldom = rare + probability, seldom + count
        else:
            expected.append(probability * len(runs))
            counts.append(count)
    if rare:
        expected.append(rare * len(runs))
        counts.append(seldom)
    return float(stats.chisquare(counts, expected).pvalue)


def generate(params: SamplingParams, drafter: Drafter, drafts: int) -> tuple[list[tuple[int, ...]], float]:
    """The first three tokens of many sequences, and the share of proposals that were right."""
    engine = make_engine(
        Bigrams(), drafter, max_num_seqs=SEQUENCES, max_batch_tokens=8 * SEQUENCES, page_size=16, max_model_len=20
    )
    harness = Harness(engine, drafts=drafts)
    sequences = [harness.add(slot, [FIRST], params, seed=slot * 977 + 5) for slot in range(SEQUENCES)]
    while open_ := [sequence for sequence in sequences if len(sequence.output_ids) < RUN]:
        harness.step([(sequence, 1) for sequence in open_])
    outputs = [output for sequence in sequences for output in sequence.outputs]
    right = sum(len(output.token_ids) - 1 for output in outputs) / sum(output.drafted for output in outputs)
    return [tuple(sequence.output_ids[:RUN]) for sequence in sequences], right


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "plain good": ({}, "good"),
    "plain bad": ({}, "bad"),
    "senseless": ({}, "senseless"),
    "cold": ({"temperature": 0.5}, "other"),
    "top-k": ({"top_k": 3}, "good"),
    "top-p": ({"top_p": 0.75}, "bad"),
    "min-p": ({"min_p": 0.3, "temperature": 1.5}, "other"),
    "penalties": ({"repetition_penalty": 1.5, "frequency_penalty": 1.0, "presence_penalty": -0.7}, "good"),
    "all": ({"top_k": 4, "min_tokens": 2, "logit_bias": {1: 1.0}, "frequency_penalty": 0.8, "top_p": 0.95}, "other"),
}


@pytest.mark.parametrize("case", CASES)
def test_drawn_proposals_give_the_exact_joint_distribution(case: str) -> None:
    settings, name = CASES[case]
    params = SamplingParams(**settings)
    drafter = SamplingDrafter(lambda known: DRAFTS[name][known[-1]])
    runs, right = generate(params, drafter, drafts=2)
    # A fixed seed: the p-value is always the same, and below this for one correct rule in a thousand.
    assert p_value(params, runs) > 1e-3
    assert 0 < right < 1 or name == "senseless"


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.75}, {"frequency_penalty": 1.0}])
@pytest.mark.parametrize("kind", ["points", "seeded"])
def test_coupled_proposals_give_it_too(settings: dict[str, Any], kind: str) -> None:
    """Proposals that are not drawn, and drawn ones of requests that ask for a seed."""
    params = SamplingParams(**settings, seed=1 if kind == "seeded" else None)
    drafter: Drafter = ScriptedDrafter(lambda slot, known: [slot % VOCAB, known[-1], 3])
    if kind == "seeded":
        drafter = SamplingDrafter(lambda known: DRAFTS["good"][known[-1]])
    runs, right = generate(params, drafter, drafts=3)
    assert p_value(params, runs) > 1e-3
    assert 0 < right < 1


class Beside(SamplingDrafter):
    """Two drawn tokens, another one beside each, and one that follows where the first was wrong."""

    def propose(self, history: TokenHistory, slots: IntArray, most: IntArray, draw: Draw) -> Proposals:
        drawn = super().propose(history, slots, np.minimum(most, 2), draw).tokens
        first, second = drawn.T
        tokens = np.stack([first, (first + 1) % VOCAB, second, (second + 2) % VOCAB, second], axis=1)
        parents = np.broadcast_to(np.array([-1, -1, 0, 0, 1]), tokens.shape)
        return Proposals(tokens.astype(np.int32), np.full(len(slots), 5, np.int32), parents.astype(np.int32))


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.75}, {"frequency_penalty": 1.0, "top_k": 4, "min_tokens": 2}])
def test_trees_of_drawn_tokens_give_it_too(settings: dict[str, Any]) -> None:
    drafter = Beside(lambda known: DRAFTS["good"][known[-1]])
    runs, right = generate(SamplingParams(**settings), drafter, drafts=5)
    assert p_value(SamplingParams(**settings), runs) > 1e-3
    assert 0 < right < 1


def test_as_many_proposals_are_right_as_can_be() -> None:
    """1 - TVD of the two."""
    drafter = SamplingDrafter(lambda known: DRAFTS["good"][known[-1]])
    _, free = generate(SamplingParams(), drafter, drafts=1)
    steps = torch.minimum(TARGET.softmax(1), DRAFTS["good"].softmax(1)).sum(1)
    assert float(steps.min()) - 0.03 < free < float(steps.max()) + 0.03
