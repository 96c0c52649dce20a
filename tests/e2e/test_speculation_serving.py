"""Speculation together with all else that happens to requests: what each is told is the same with drafts and without.

Scheduler, engine, runner and drafter are real, models tiny and random, in float32.
"""

from pathlib import Path
from typing import Any

import pytest
import transformers
from msgspec.structs import replace

from quire.core.request import Request
from quire.core.speculation import DraftInfo, StepCosts
from quire.scheduler.swap import SwapCosts

from .speculating import Run, Stack, assert_equal, request, save, save_like
from .test_parity import CASES, GQA
from .test_prefix import tokens

SHARED = tokens(37, seed=1)
POOL = 24
"""Blocks of a pool that is too small for all."""
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "scored": {"temperature": 0.0, "logprobs": 2, "prompt_logprobs": 1},
    "drawn": {"logprobs": 0},
    "cut": {"top_p": 0.8, "top_k": 20, "temperature": 1.4},
    "penalised": {"presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2, "temperature": 0.0},
    "biased": {"logit_bias": {5: 8.0, 6: 8.0}, "min_p": 0.05, "frequency_penalty": 0.4},
    "stopped": {"stop_token_ids": tuple(range(3, 20)), "ignore_eos": False, "temperature": 1.5},
    "at least": {"stop_token_ids": tuple(range(3, 70)), "min_tokens": 12, "temperature": 0.0},
    "choices": {"n": 3, "temperature": 1.3, "stop_token_ids": tuple(range(3, 9))},
    "one": {"max_tokens": 1},
    "two": {"max_tokens": 2, "temperature": 0.0},
    "seven": {"max_tokens": 7, "temperature": 0.7},
    "without": {"speculate": False, "temperature": 0.0, "max_tokens": 60},
    "without, scored": {"speculate": False, "logprobs": 1},
    "long": {"temperature": 0.0, "max_tokens": 40},
}


def requests(seeded: bool = True) -> list[Request]:
    """One of each kind; seeded: as their users wish, so that they are coupled whatever drafts."""
    return [
        request(
            name,
            (*SHARED[: 9 * (number % 5)], *tokens(3 + number, seed=number)),
            seed=number,
            seeded=seeded,
            priority=number % 3,
            **params,
        )
        for number, (name, params) in enumerate(KINDS.items())
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"), transformers.LlamaConfig(**GQA))


@pytest.fixture(scope="module")
def drafts(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By name: who drafts. The target, one that often agrees, one that knows nothing and little context."""
    blind = transformers.LlamaConfig(**GQA | {"num_hidden_layers": 1, "max_position_embeddings": 40})
    return {
        "ngram": "ngram",
        "layerskip": "layerskip:2",
        "itself": str(folder),
        "like": str(save_like(tmp_path_factory.mktemp("like"), folder)),
        "blind": str(save(tmp_path_factory.mktemp("blind"), blind, seed=9)),
    }


@pytest.fixture(scope="module")
def stack(folder: Path) -> Stack:
    return Stack(folder, swap_memory=2**21)


@pytest.fixture(scope="module")
def plain(stack: Stack) -> Run:
    """Without drafts, one after the other."""
    return stack.serve(requests(), num_host_pages=0, prefix_cache=False, max_num_seqs=1)


SCENES: dict[str, dict[str, Any]] = {
    "roomy": {},
    "small chunks": {"max_batch_tokens": 13},
    "lengths chosen, looking ahead": {"looks_ahead": True, "prefix_cache": False},
    "recomputed": {"blocks": POOL},
    "swapped": {"blocks": POOL, "swaps": True},
    "by priority": {"policy": "priority", "blocks": POOL},
}


def act(stack: Stack, scene: str, draft: DraftInfo | None, sent: list[Request]) -> Run:
    """The requests under the circumstances of a scene."""
    changes = dict(SCENES[scene])
    if "blocks" in changes:
        changes["num_pages"] = changes.pop("blocks") * stack.rows
    if not changes.pop("swaps", False):
        changes["num_host_pages"] = 0
    return stack.serve(sent, draft, **changes)


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize(
    "name",
    ["layerskip", "itself", "like", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ngram", "blind"))],
)
def test_requests_are_told_the_same(
    stack: Stack, plain: Run, drafts: dict[str, str], name: str, scene: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SwapCosts, "swap_pays", lambda *_: True)
    ahead = "ahead" in scene
    run = act(stack, scene, stack.draft(drafts[name], fixed=not ahead), requests())
    assert_equal(run.told, plain.told)
    stats, counts = run.loop.stats(), run.counts
    if "blocks" in SCENES[scene]:
        assert stats.preemptions_total > 0
        assert (stats.swap_in_sequences_total > 0) == (scene == "swapped")
    # Who does not draft decodes on alone at the end, and steps are planned ahead again.
    assert counts.draft_tokens > 0 and (run.ahead > 0) == ahead
    assert run.told["without", 0].most_at_once == 1
    if name in ("itself", "like"):
        assert counts.accepted_tokens > 30 and run.told["long", 0].most_at_once > 2
        assert run.cut_short > 0 or scene == "small chunks"
    if name == "itself":
        assert counts.accepted_tokens == counts.draft_tokens


@pytest.mark.parametrize("looks_ahead", [False, True])
@pytest.mark.parametrize("name", ["ngram", "itself"])
def test_who_is_cancelled_or_late_leaves_nothing_behind(
    stack: Stack, plain: Run, drafts: dict[str, str], name: str, looks_ahead: bool
) -> None:
    def many(count: int) -> Any:
        return lambda choice: len(choice.tokens) >= count

    sent = requests()
    sent[2:2] = [request("late", tokens(20, seed=77), max_tokens=90, timeout=12.0)]
    aborts = {"long": many(9), "greedy": many(1), "without": many(5), "penalised": many(2), "scored": many(12)}
    run = stack.serve(sent, stack.draft(drafts[name]), aborts, looks_ahead, num_host_pages=0)
    late = run.told.pop(("late", 0))
    assert late.end == "RequestTimeoutError" and late.tokens
    for gone in aborts:
        choice = run.told.pop((gone, 0))
        assert choice.end is None and aborts[gone](choice)
        assert choice.tokens == plain.told[gone, 0].tokens[: len(choice.tokens)]
    assert_equal(run.told, {key: choice for key, choice in plain.told.items() if key[0] not in aborts})


@pytest.mark.parametrize("name", ["ngram", "layerskip", "itself"])
def test_prefixes_hit_and_miss_alike(stack: Stack, drafts: dict[str, str], name: str) -> None:
    """Turns of a dialogue, whose answers were accepted in runs: they are reused as far as their blocks are full."""
    said = []
    for draft in (None, stack.draft(drafts[name], fixed=False)):
        dialogue, told = tokens(9, seed=2), []
        loop = stack.loop(draft, num_host_pages=0)
        for turn in range(5):
            run = stack.serve([request(str(turn), dialogue, max_tokens=13)], loop=loop)
            choice = run.told[str(turn), 0]
            told.append((choice.tokens, choice.cached))
            dialogue = [*dialogue, *choice.tokens, *tokens(turn, seed=turn)]
        said.append(told)
        assert (sum(loop.stats().speculation.lengths[1:]) > 0) == (draft is not None)
    assert said[0] == said[1] and said[0][-1][1] >= 60


@pytest.mark.parametrize("cheap", [True, False])
def test_lengths_are_chosen_and_no_text_depends_on_it(
    stack: Stack, plain: Run, drafts: dict[str, str], cheap: bool
) -> None:
    """Where drafts pay they are asked for, where they do not hardly."""
    info = stack.draft(drafts["like"], fixed=False)
    costly = StepCosts(rows=[(1, 1.0), (64, 64.0)], drafts=[(1, 1.0), (8, 8.0)])
    run = stack.serve(requests(), info if cheap else replace(info, costs=costly), num_host_pages=0)
    assert_equal(run.told, plain.told)
    if cheap:
        assert run.counts.draft_tokens > 3 * run.counts.lengths[0]
    else:
        assert run.counts.lengths[0] > 3 * sum(run.counts.lengths[1:])


def slow(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in names else name for name in CASES]


@pytest.mark.parametrize("case", slow("llama", "qwen2", "qwen3", "phi3", "gpt-neox"))
def test_kinds_of_models_and_runners(tmp_path: Path, case: str) -> None:
    """Preempted and recomputed, in small chunks, with windows that drafts reach beyond."""
    folder = save(tmp_path, CASES[case].config())
    stack = Stack(folder, runner=CASES[case].runner, max_model_len=100)
    kinds = ["greedy", "scored", "cut", "penalised", "at least", "choices", "seven", "long"]
    sent = [one for one in requests() if one.id in kinds]
    alone = stack.serve(sent, prefix_cache=False, max_num_seqs=1)
    for name in ("ngram", "itself", *(["layerskip"] if CASES[case].runner == "native" else [])):
        draft = stack.draft({"itself": str(folder), "layerskip": "layerskip:2"}.get(name, name))
        need = stack.loop().scheduler.config.pages_needed(96)
        run = stack.serve(sent, draft, max_batch_tokens=17, num_pages=int(1.3 * need))
        assert_equal(run.told, alone.told)
        # A sequence with windows holds so little that others fit beside it.
        assert run.loop.stats().preemptions_total > 0 or stack.config.row_windows is not None
        assert run.counts.draft_tokens > 0
        assert run.counts.accepted_tokens == run.counts.draft_tokens or name != "itself"
