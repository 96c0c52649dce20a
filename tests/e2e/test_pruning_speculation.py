"""Sequences that prune and draft: they forget the same as without drafts, and say what the kept entries say.

See `test_pruning_matrix`, whose checks hold here after every step and at the end.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.core.ids import RequestId
from quire.pruning.table import POLICIES, policy_infos
from quire.scheduler.swap import SwapCosts

from .speculating import Stack, save_like
from .test_pruning_matrix import QUICK, Serving, params, prompt, save

WHOLE = 400
"""Tokens of a step that takes all prompts at once: then nobody is cut otherwise because of how others get on."""
EVERY = 7
OUTPUT = 26


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("gqa"))


@pytest.fixture(scope="module")
def drafts(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    like = save_like(tmp_path_factory.mktemp("like"), model)
    return {"ngram": "ngram", "layerskip": "layerskip:2", "like": str(like), "itself": str(model)}


@pytest.fixture(scope="module")
def stack(model: Path) -> Stack:
    return Stack(model, swap_memory=2**21)


def serving(stack: Stack, model: Path, draft: str | None, fixed: bool = True, **changes: Any) -> Serving:
    """A checked loop with or without somebody who drafts; changes: of the scheduler's settings."""
    info = None if draft is None else stack.draft(draft, fixed=fixed)
    return Serving(model, stack.loop(info, **{"max_batch_tokens": WHOLE, "num_host_pages": 0} | changes))


def policies(serving: Serving, policy: str) -> None:
    """All that differs in how it may be asked for; decoding in columns, alone, drawn and beside who forgets nothing."""
    ask = {"max_tokens": OUTPUT}
    budget = "uniform" if policy == "quest" else "ada"
    serving.submit("columns", prompt(61), params(policy, every=EVERY), logprobs=None, **ask)
    serving.submit("scored", prompt(45, 1), params(policy, every=EVERY + 2, budget=budget), **ask)
    serving.submit("drawn", prompt(33, 2), params(policy, every=5), n=2, temperature=0.9, seed=3, **ask)
    serving.submit("refined", prompt(50, 3), params(policy, every=0, refine=("value-norm",)), **ask)
    serving.submit("plain", prompt(30, 4), None, **ask)
    serving.run()
    serving.check()


@pytest.fixture(scope="module")
def without(stack: Stack, model: Path) -> dict[str, Serving]:
    """Filled by who needs it."""
    return {}


@pytest.mark.parametrize("name", ["ngram", "layerskip", "like", "itself"])
@pytest.mark.parametrize("policy", policy_infos())
def test_with_drafts_it_forgets_the_same(
    stack: Stack, model: Path, drafts: dict[str, str], without: dict[str, Serving], policy: str, name: str
) -> None:
    if policy not in without:
        without[policy] = serving(stack, model, None)
        policies(without[policy], policy)
    plain, drafting = without[policy], serving(stack, model, drafts[name])
    policies(drafting, policy)
    assert drafting.tokens == plain.tokens
    for key, said in plain.logprobs.items():
        torch.testing.assert_close(torch.tensor(drafting.logprobs[key]), torch.tensor(said), atol=2e-4, rtol=1e-3)
        (life,), (other,) = drafting.recorder.lives[key], plain.recorder.lives[key]
        assert life.forgotten == other.forgotten
        end = len(plain.requests[key[0]].prompt_ids) + OUTPUT - 1
        read = {place: left_out for place, left_out in life.passed_over.items() if place[2] < end}
        assert read == other.passed_over and (read or policy != "quest" or key[0] in ("plain", "drawn"))
    assert drafting.recorder.compactions == plain.recorder.compactions
    assert drafting.recorder.compactions > 0 or policy == "quest"
    uses = [(served.last[key].cache) for key in plain.last for served in (plain, drafting)]
    assert uses[::2] == uses[1::2]
    counts = drafting.loop.stats().speculation
    assert counts.draft_tokens > 0 and (name == "ngram" or counts.accepted_tokens > 10)
