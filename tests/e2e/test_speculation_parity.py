"""Engines with real networks: proposals change neither text nor what pruning policies have seen."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quire.core.config import EngineConfig
from quire.core.plan import BatchPlan, PruneOrder
from quire.core.pruning import PruneParams
from quire.core.request import SamplingParams
from quire.engine.engine import Engine
from quire.models.runner import ModelRunner
from quire.speculation.drafter import Drafter

from ..engine.harness import Harness, Sequence, make_engine
from ..engine.scripted import BranchingDrafter, ScriptedDrafter
from ..models.conftest import load
from .test_parity import CASES, GQA

PROMPTS = [torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 17, 41)]
TOKENS = 20
Guess = Callable[[int, list[int]], list[int]]


@pytest.fixture(scope="module", params=CASES)
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    case = CASES[request.param]
    return load_tiny(tmp_path_factory.mktemp(request.param), case.config(), case.runner)


def load_tiny(folder: Path, config: transformers.PretrainedConfig, runner: str) -> ModelRunner:
    torch.manual_seed(5)
    transformers.AutoModelForCausalLM.from_config(config).eval().save_pretrained(folder)
    return load(folder, runner)


def run(
    runner: ModelRunner,
    guess: Guess | None = None,
    prompts: list[list[int]] = PROMPTS,
    params: SamplingParams | None = None,
    prune: PruneParams | None = None,
    trees: bool = False,
) -> tuple[Harness, list[Sequence]]:
    """All prompts together, up to exactly `TOKENS` tokens each; trees: guesses are hidden in them."""
    drafter: Drafter | None = None if guess is None else ScriptedDrafter(guess)
    if trees and drafter is not None:
        drafter = BranchingDrafter(drafter, 97)
    harness = Harness(make_engine(runner, drafter, max_model_len=100), drop_windows=True)
    sequences = [harness.add(slot, prompt, params, slot, prune=prune) for slot, prompt in enumerate(prompts)]
    while open_ := [s for s in sequences if len(s.output_ids) < TOKENS]:
        harness.drafts = min(4, TOKENS - 1 - max(len(s.output_ids) for s in open_))
        harness.step([(s, min(9, len(s.tokens) - s.computed)) for s in open_])
    return harness, sequences


def guesses(texts: list[list[int]]) -> dict[str, Guess]:
    """By one who knows the texts: always right, always wrong, sometimes right."""
    dice = random.Random(3)

    def wrong(slot: int, known: list[int]) -> list[int]:
        return [(token + 1) % 97 for token in texts[slot][len(known) :]]

    def mixed(slot: int, known: list[int]) -> list[int]:
        ahead = texts[slot][len(known) : len(known) + dice.randrange(6)]
        return [token if dice.random() < 0.7 else 5 for token in ahead]

    return {"right": lambda slot, known: texts[slot][len(known) :], "wrong": wrong, "mixed": mixed}


@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0.0, logprobs=1), SamplingParams(top_p=0.9, presence_penalty=0.5)], ids=str
)
def test_text_is_the_same(runner: ModelRunner, params: SamplingParams) -> None:
    _, alone = run(runner, params=params)
    texts = [sequence.tokens for sequence in alone]
    for name, guess in guesses(texts).items():
        _, sequences = run(runner, guess, params=params)
        assert [sequence.tokens for sequence in sequences] == texts, name
        for one, other in zip(alone, sequences, strict=True):
            before, after = ([item for output in s.outputs for item in output.logprobs] for s in (one, other))
            assert [i.logprob for i in before] == pytest.approx([i.logprob for i in after], abs=1e-4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    return load_tiny(tmp_path_factory.mktemp("llama"), transformers.LlamaConfig(**GQA), "native")


@pytest.mark.parametrize("policy", ["snapkv", "tova", "h2o", "expected", "window"])
@pytest.mark.parametrize("guesser", ["right", "wrong", "mixed"])
def test_policies_see_the_accepted_rows_and_no_others(llama: ModelRunner, policy: str, guesser: str) -> None:
    prune = PruneParams(policy=policy, keep=0.5, window=7, sinks=2, floor=9)
    harness, alone = run(llama, prune=prune)
    before = observed(harness, alone)
    guess = guesses([sequence.tokens for sequence in alone])[guesser]
    harness, sequences = run(llama, guess, prune=prune)
    assert [sequence.tokens for sequence in sequences] == [sequence.tokens for sequence in alone]
    after = observed(harness, sequences)
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=2e-4, rtol=1e-3, msg=str(name))


@torch.inference_mode()
def observed(harness: Harness, sequences: list[Sequence]) -> dict[Any, Any]:
    """All that the policies are shown of each sequence, and what they choose to keep."""
    pruner: Any = harness.engine._pruner
    seen: dict[Any, Any] = {}
    for sequence in sequences:
        for view in pruner._views(sequence.slot):
            for name in ("queries", "query_positions", "mass", "query_mean", "query_covariance"):
                value = getattr(view, name)
                if value is not None:
                    seen[sequence.slot, view.layer, name] = value
        output = harness.engine.step(BatchPlan((), prunes=(PruneOrder(sequence.slot, 12),)))
        seen[sequence.slot, "kept"] = torch.from_numpy(output.kept[0])
        seen[sequence.slot, "computed"] = torch.tensor(int(harness.engine.cache.computed[sequence.slot]))
    return seen


def test_every_row_reads_the_pages_it_would_read_alone(tmp_path: Path) -> None:
    """Quest, with pages that are filled by proposals and read by later ones."""
    runner = load_tiny(tmp_path, transformers.LlamaConfig(**GQA | {"num_hidden_layers": 4}), "native")
    prompts = [PROMPTS[2], [*PROMPTS[2], *PROMPTS[1]], PROMPTS[0]]
    prune = PruneParams(policy="quest", keep=0.2, window=2, sinks=2, floor=4)
    _, alone = run(runner, prompts=prompts, prune=prune)
    _, whole = run(runner, prompts=prompts)
    texts = [sequence.tokens for sequence in alone]
    assert texts != [sequence.tokens for sequence in whole], "the selection makes no difference here"
    for name, guess in guesses(texts).items():
        _, sequences = run(runner, guess, prompts=prompts, prune=prune)
        assert [sequence.tokens for sequence in sequences] == texts, name
        assert any(output.drafted for sequence in sequences for output in sequence.outputs)


@pytest.mark.parametrize("runner", ["native", "transformers"])
def test_real_drafters_change_no_text(tmp_path: Path, runner: Any) -> None:
    """Greedy, seeded and penalised; the target as its own draft is always right where its tokens are coupled."""
    load_tiny(tmp_path, transformers.LlamaConfig(**GQA), runner)
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(top_p=0.9, seed=4, presence_penalty=0.3),
        SamplingParams(temperature=0.0, frequency_penalty=0.4, min_tokens=12, logprobs=2),
    ]
    texts: dict[str, list[list[int]]] = {}
    for draft in ("none", "ngram", str(tmp_path), *(["layerskip:2"] if runner == "native" else [])):
        config = EngineConfig(
            model=str(tmp_path), draft=draft, runner=runner, device="cpu", dtype="float32", page_size=4,
            max_num_seqs=6, max_batch_tokens=64, max_model_len=100, kv_memory=1 << 20,
        )  # fmt: skip
        engine = Engine.load(config, lambda phase, done, total: None)
        assert (engine.info.draft is None) == (draft == "none")
        if engine.info.draft is not None:
            assert engine.info.draft.costs.rows and engine.info.draft.costs.drafts
        harness = Harness(engine, drop_windows=True)
        sequences = [harness.add(i, p, q, i) for i, (p, q) in enumerate(zip(PROMPTS, kinds, strict=True))]
        outputs = []
        while open_ := [s for s in sequences if len(s.output_ids) < 40]:
            # Never a chunk and proposals at once: the scheduler does not either.
            harness.drafts = min(4, 39 - max(len(s.output_ids) for s in open_))
            if any(len(s.tokens) - s.computed > 1 for s in open_):
                harness.drafts = 0
            outputs += harness.step([(s, min(9, len(s.tokens) - s.computed)) for s in open_])
        texts[draft] = [s.tokens for s in sequences]
        assert texts[draft] == texts["none"], draft
        drafted = sum(output.drafted for output in outputs)
        right = sum(len(output.token_ids) - 1 for output in outputs if output.drafted)
        assert (drafted > 0) == (draft != "none")
        if draft == str(tmp_path):
            assert right == drafted
