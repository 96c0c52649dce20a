"""Trees of drafts in the whole stack: real drafters, whose proposals are hidden among others, change no text.

Scheduler, engine and runners are real, models tiny and random, in float32. See `test_speculation_serving` and
`test_pruning_speculation`, whose checks these are.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quire.core.pruning import PruneParams
from quire.scheduler.swap import SwapCosts

from . import test_speculation_parity as parity
from .speculating import Run, Stack, assert_equal, save, save_like
from .test_parity import CASES, GQA
from .test_pruning_matrix import Serving, params, prompt
from .test_pruning_matrix import save as save_for_pruning
from .test_speculation_serving import SCENES, requests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"), transformers.LlamaConfig(**GQA))


@pytest.fixture(scope="module")
def drafts(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    like = save_like(tmp_path_factory.mktemp("like"), folder)
    return {"ngram": "ngram", "layerskip": "layerskip:2", "itself": str(folder), "like": str(like)}


@pytest.fixture(scope="module")
def stack(folder: Path) -> Stack:
    return Stack(folder, swap_memory=2**21)


@pytest.fixture(scope="module")
def plain(stack: Stack) -> Run:
    """Without drafts, one after the other."""
    return stack.serve(requests(), num_host_pages=0, prefix_cache=False, max_num_seqs=1)


@pytest.mark.parametrize(
    ("scene", "name"),
    [
        ("roomy", "ngram"),
        ("small chunks", "itself"),
        ("lengths chosen, looking ahead", "like"),
        ("recomputed", "layerskip"),
        ("swapped", "like"),
    ],
)
def test_requests_are_told_the_same(
    stack: Stack, plain: Run, drafts: dict[str, str], name: str, scene: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Penalties, stop tokens within an accepted path, choices, scores, preemption: drafters with caches stay right."""
    monkeypatch.setattr(SwapCosts, "swap_pays", lambda *_: True)
    changes = dict(SCENES[scene])
    if "blocks" in changes:
        changes["num_pages"] = changes.pop("blocks") * stack.rows
    if not changes.pop("swaps", False):
        changes["num_host_pages"] = 0
    draft = stack.draft(drafts[name], most=7, fixed="ahead" not in scene, trees=True)
    run = stack.serve(requests(), draft, **changes)
    assert_equal(run.told, plain.told)
    counts = run.counts
    assert counts.draft_tokens > counts.accepted_tokens > (0 if name in ("ngram", "layerskip") else 30)
    assert "blocks" not in SCENES[scene] or run.loop.stats().preemptions_total > 0
    if name == "itself":
        assert run.cut_short > 0 and run.told["long", 0].most_at_once > 3
        # Of a chain that is always right, all would be accepted that were asked for.
        assert counts.accepted_per_position[0] == counts.drafts and counts.accepted_per_position[-1] == 0


@pytest.fixture(scope="module")
def pruned_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_for_pruning(tmp_path_factory.mktemp("gqa"))


@pytest.mark.parametrize("policy", ["knorm", "window", "snapkv", "quest"])
def test_who_prunes_forgets_the_same(pruned_model: Path, policy: str) -> None:
    """Heads of unequal lengths, positions that close up, and policies whose sequences get chains instead."""
    stack, ended = Stack(pruned_model, swap_memory=2**21), []
    for trees in (False, True):
        draft = stack.draft(str(pruned_model), most=7, trees=True) if trees else None
        served = Serving(pruned_model, stack.loop(draft, max_batch_tokens=400, num_host_pages=0))
        budget = "ada" if policy in ("knorm", "snapkv") else "uniform"
        served.submit("a", prompt(61), params(policy, every=7), max_tokens=40)
        served.submit("b", prompt(45, 1), params(policy, every=9, budget=budget), max_tokens=40)
        served.submit("drawn", prompt(33, 2), params(policy, every=5), n=2, temperature=0.9, seed=3, max_tokens=40)
        served.submit("plain", prompt(30, 4), None, max_tokens=40)
        served.run()
        served.check()
        ended.append(served)
    assert ended[0].tokens == ended[1].tokens
    assert ended[0].recorder.compactions == ended[1].recorder.compactions
    counts = ended[1].loop.stats().speculation
    assert counts.accepted_per_position[2] > 5 and counts.draft_tokens > 1.2 * counts.accepted_tokens


@pytest.mark.parametrize("chosen", [{}, {"positions": "cache", "keep": 0.01, "floor": 14, "every": 6}])
def test_positions_in_the_cache(pruned_model: Path, chosen: dict[str, Any]) -> None:
    """A node is rotated to where its entry comes to lie if it is accepted."""
    stack, said = Stack(pruned_model), []
    for trees in (False, True):
        draft = stack.draft(str(pruned_model), most=7, trees=True) if trees else None
        served = Serving(pruned_model, stack.loop(draft))
        served.submit("a", prompt(61), PruneParams(policy="window", window=5, sinks=2, **chosen), max_tokens=60)
        served.run()
        said.append((served.tokens["a", 0], served.logprobs["a", 0]))
    assert said[0][0] == said[1][0]
    torch.testing.assert_close(torch.tensor(said[0][1]), torch.tensor(said[1][1]), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_kinds_of_models_and_runners(tmp_path: Path, case: str) -> None:
    """Windows, soft caps, sinks and the library's own modules; drawn with penalties."""
    runner = parity.load_tiny(tmp_path, CASES[case].config(), CASES[case].runner)
    sampling = parity.SamplingParams(top_p=0.9, presence_penalty=0.5, logprobs=1)
    _, alone = parity.run(runner, params=sampling)
    texts = [sequence.tokens for sequence in alone]
    for name, guess in parity.guesses(texts).items():
        _, sequences = parity.run(runner, guess, params=sampling, trees=True)
        assert [sequence.tokens for sequence in sequences] == texts, name
        assert any(output.branched for sequence in sequences for output in sequence.outputs)
        for one, other in zip(alone, sequences, strict=True):
            before, after = ([item.logprob for output in s.outputs for item in output.logprobs] for s in (one, other))
            assert before == pytest.approx(after, abs=1e-4)
