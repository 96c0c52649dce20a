"""Sequences that prune and draft: they forget the same as without drafts, and say what the kept entries say.

See `test_pruning_matrix`, whose checks hold here after every step and at the end.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from quire.core.ids import RequestId
from quire.pruning.table import SELECTORS, policy_infos

from .speculating import Stack, save_like
from .test_pruning_matrix import Serving, params, prompt, save

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
    ask: dict[str, Any] = {"max_tokens": OUTPUT}
    budget = "uniform" if policy in SELECTORS else "ada"
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


@pytest.mark.parametrize(
    "name", ["like", "layerskip", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ngram", "itself"))]
)
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
        assert read == other.passed_over and (read or policy not in SELECTORS or key[0] in ("plain", "drawn"))
    assert drafting.recorder.compactions == plain.recorder.compactions
    assert drafting.recorder.compactions > 0 or policy in SELECTORS
    uses = [(served.last[key].cache) for key in plain.last for served in (plain, drafting)]
    assert uses[::2] == uses[1::2]
    counts = drafting.loop.stats().speculation
    assert counts.draft_tokens > 0 and (name == "ngram" or counts.accepted_tokens > 10)


@pytest.mark.parametrize(
    "name", ["itself", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ngram", "layerskip"))]
)
@pytest.mark.parametrize("policy", policy_infos())
def test_in_small_steps_and_with_reused_prefixes(
    stack: Stack, model: Path, drafts: dict[str, str], policy: str, name: str
) -> None:
    served = serving(stack, model, drafts[name], fixed=False, max_batch_tokens=24)
    first = prompt(61)
    served.submit("plain", prompt(30, 1), None)
    served.submit("a", first, params(policy), max_tokens=20)
    served.run()
    served.submit("b", [*first, 9, 9], params(policy), n=3, temperature=0.8)  # begins with what `a` published
    served.submit("c", prompt(50, 2), params(policy, chunked=False, context=40), max_tokens=20)
    served.submit("again", first, None, max_tokens=20)
    served.run()
    served.check()
    assert served.first["again", 0].cached_tokens > 0 and len(served.ended) == 7
    assert served.loop.stats().speculation.draft_tokens > 0


@pytest.mark.usefixtures("swapping")
@pytest.mark.parametrize(
    "name", ["itself", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ngram", "like"))]
)
@pytest.mark.parametrize("swaps", [False, True])
@pytest.mark.parametrize("when", ["pressure", "always"])
def test_in_a_pool_too_small_for_all(
    stack: Stack,
    model: Path,
    drafts: dict[str, str],
    when: str,
    swaps: bool,
    name: str,
) -> None:
    host = stack.config.num_host_pages if swaps else 0
    small: dict[str, Any] = {"num_pages": 31 * stack.rows, "num_host_pages": host, "prunes_under_pressure": True}
    served = serving(stack, model, drafts[name], max_batch_tokens=24, **small)
    for number, policy in enumerate(policy_infos()):
        ask = params(policy, keep=0.6, when=when if policy_infos()[policy].relieves else "always")
        logprobs = 0 if number % 2 else None
        served.submit(f"r{number}", prompt(40, number % 5), ask, max_tokens=30, logprobs=logprobs, n=1 + number % 2)
    served.submit("plain", prompt(41, 9), None, max_tokens=40)
    served.run()
    assert not served.failed and len(served.ended) == sum(request.params.n for request in served.requests.values())
    served.check()
    stats = served.loop.stats()
    assert stats.preemptions_total > 0 and stats.speculation.draft_tokens > 0
    assert (stats.swap_in_sequences_total > 0) == swaps
    assert any("pressure" in totals.prunes for totals in stats.prunes.values()) or when == "always"


@pytest.mark.parametrize("policy", ["snapkv", "kvzip", "quest"])
@pytest.mark.parametrize("name", ["itself"])
def test_cancelled_at_any_moment_it_leaves_nothing_behind(
    stack: Stack, model: Path, drafts: dict[str, str], name: str, policy: str
) -> None:
    alone = serving(stack, model, None, max_batch_tokens=24)
    alone.submit("other", prompt(30, 1), None, max_tokens=20)
    alone.run()
    for steps in (1, 3, 4, 6, 9):
        served = serving(stack, model, drafts[name], max_batch_tokens=24)
        served.submit("other", prompt(30, 1), None, max_tokens=20)
        served.submit("gone", prompt(61), params(policy), max_tokens=50)
        for _ in range(steps):
            served.step()
        served.loop.abort(RequestId("gone"))
        served.run()
        assert served.tokens["other", 0] == alone.tokens["other", 0]
        assert ("gone", 0) not in served.ended
