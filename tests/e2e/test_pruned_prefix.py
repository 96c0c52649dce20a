"""A pruned context is pruned once: later requests about it say what they would have said had they pruned it themselves.

A tiny random model in float32; `kept_oracle` also holds all that is said against a dense pass, and pages that others
may read against what they were.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from quire.core.config import embedded_model
from quire.core.ids import RequestId
from quire.core.pruning import PruneParams
from quire.pruning.table import POLICIES
from quire.scheduler.swap import SwapCosts

from .conftest import MODEL_NAME, RunningServer
from .test_pruning_matrix import PAGE_BYTES, Serving, params, prompt, save

CONTEXT = 41
OBSERVES = ("tova", "snapkv", "h2o", "expected")
"""Policies that look at queries: nobody has those of a context that was pruned for another."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"))


def question(number: int, length: int = 7) -> list[int]:
    return prompt(CONTEXT) + prompt(length, 100 + number)


def about(policy: str, **changes: Any) -> PruneParams:
    """The context is pruned on its own; later prunes, too, where that is allowed."""
    return params(policy, **{"context": CONTEXT, "every": 0 if policy in OBSERVES else 4} | changes)


def cached(serving: Serving, name: str, index: int = 0) -> int:
    return serving.first[name, index].cached_tokens


def ask(serving: Serving, name: str, ids: list[int], prune: PruneParams, **options: Any) -> None:
    serving.submit(name, ids, prune, **options)
    serving.run()


def assert_same(told: Serving, expected: Serving, name: str) -> None:
    """Tokens, log-probabilities and what is told of the cache."""
    choices = [key for key in expected.tokens if key[0] == name]
    assert choices
    for key in choices:
        assert told.tokens[key] == expected.tokens[key], key
        mine, other = torch.tensor(told.logprobs[key]), torch.tensor(expected.logprobs[key])
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
        assert told.last[key].cache == expected.last[key].cache


def compare(model: Path, prune: PruneParams, *, choices: int = 1, **settings: Any) -> Serving:
    """Ask twice about the context, and the second again of an engine that keeps nothing; returns the first engine."""
    sharing, alone = Serving(model, **settings), Serving(model, **settings, prefix_cache=False)
    ask(sharing, "first", question(1), prune)
    prunes = sharing.loop.stats().prunes[prune.policy].prunes["prompt"]
    computed = sharing.loop.stats().prompt_tokens_total
    options: dict[str, Any] = {"n": choices, "temperature": 0.7 if choices > 1 else 0.0, "max_tokens": 16}
    ask(sharing, "second", question(2), prune, **options)
    ask(alone, "second", question(2), prune, **options)
    for index in range(choices):
        assert cached(sharing, "second", index) == CONTEXT
    stats = sharing.loop.stats()
    assert stats.prompt_tokens_total == computed + 7 * choices, "not a token of the context"
    assert stats.prunes[prune.policy].prunes["prompt"] == prunes
    assert stats.prefix_hits_total == stats.prefix_pruned_hits_total == CONTEXT * choices
    assert_same(sharing, alone, "second")
    if prune.positions == "text":
        sharing.check()
    return sharing


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "quest"])
def test_the_second_request_says_what_it_would_have_said(model: Path, policy: str) -> None:
    compare(model, about(policy))


@pytest.mark.parametrize(
    ("budget", "runner"),
    [("pyramid", "native"), ("ada", "transformers"), ("global", "native"), ("threshold", "native")],
)
def test_heads_of_any_length(model: Path, budget: Any, runner: str) -> None:
    threshold = 0.05 if budget == "threshold" else None
    prune = about("kvzip", budget=budget, threshold=threshold, window=1, sinks=0)
    sharing = compare(model, prune, runner=runner, choices=3)
    ask(sharing, "third", question(3), prune)
    assert cached(sharing, "third") == CONTEXT
    sharing.check()


@pytest.mark.parametrize(("page_size", "entries"), [(4, 15), (4, 16), (4, 17), (16, 12), (16, 16)])
def test_pages_that_end_full_or_not(model: Path, page_size: int, entries: int) -> None:
    compare(model, about("knorm", keep=0.1, floor=entries), page_size=page_size)


@pytest.mark.parametrize("chunked", [True, False])
def test_choices_of_one_request_prune_their_context_once(model: Path, chunked: bool) -> None:
    for prefix_cache in (True, False):
        serving = Serving(model, prefix_cache=prefix_cache)
        prune = about("keydiff", chunked=chunked, every=0)
        ask(serving, "a", question(1), prune, n=3, temperature=0.9)
        assert [cached(serving, "a", index) for index in range(3)] == [0, CONTEXT, CONTEXT]
        assert serving.loop.stats().prunes["keydiff"].prunes["prompt"] == (2 if chunked else 1)
        assert serving.loop.stats().pages_cached > 0 or not prefix_cache
        serving.check()


def test_requests_that_come_together_prune_once(model: Path) -> None:
    serving = Serving(model)
    for number in range(4):
        serving.submit(str(number), question(number), about("kvzip"))
    serving.run()
    assert [cached(serving, str(number)) for number in range(4)] == [0, *[CONTEXT] * 3]
    assert serving.loop.stats().prunes["kvzip"].prunes == {"prompt": 1}
    serving.check()


def test_only_what_was_pruned_alike_is_reused(model: Path) -> None:
    serving = Serving(model)
    base = about("knorm")
    ask(serving, "first", question(1), base)
    others = [
        about("keydiff"),
        *(about("knorm", **change) for change in (
            {"keep": 0.5}, {"floor": 7}, {"window": 6}, {"sinks": 3}, {"budget": "ada"}, {"refine": ("chunk",)},
            {"chunked": False}, {"context": CONTEXT - 1}, {"when": "pressure"},
        )),
    ]  # fmt: skip
    for number, prune in enumerate(others):
        ask(serving, f"other{number}", question(1), prune)
        assert serving.loop.stats().prefix_pruned_hits_total == 0, prune
    ask(serving, "later prunes may differ", question(1), about("knorm", every=9))
    ask(serving, "another document", [9, *question(1)[1:]], base)
    assert cached(serving, "later prunes may differ") == CONTEXT
    assert serving.loop.stats().prefix_pruned_hits_total == CONTEXT
    serving.check()


@pytest.mark.parametrize("policy", OBSERVES)
def test_what_a_later_prune_must_have_seen_is_not_reused(model: Path, policy: str) -> None:
    scenes: tuple[tuple[dict[str, Any], PruneParams], ...] = (
        ({}, about(policy, every=4)),
        ({"pressure": "prune"}, about(policy)),
    )
    for settings, prune in scenes:
        serving = Serving(model, **settings)
        for number in range(2):
            ask(serving, str(number), question(number), prune)
        assert serving.loop.stats().prefix_pruned_hits_total == 0
        serving.check()


def test_salts_and_instructions_keep_requests_apart(model: Path) -> None:
    serving = Serving(model)

    def twice(name: str, **changes: Any) -> int:
        request = msgspec.structs.replace(serving.requests["first"], id=RequestId(name), **changes)
        serving.requests[name] = request
        serving.loop.submit(request)
        serving.run()
        return cached(serving, name)

    ask(serving, "first", question(1), about("kvzip"))
    assert twice("alike") == CONTEXT
    assert twice("salted", cache_salt="a") == twice("another key's", namespace="b") == 0
    assert twice("asked otherwise to repeat", repeat_ids=(8, 9)) in range(CONTEXT), "at most blocks before the prune"
    assert twice("alike again") == CONTEXT


@pytest.mark.parametrize("policy", ["knorm", "kvzip", "window"])
def test_drafts_change_nothing(model: Path, policy: str) -> None:
    sharing = compare(model, about(policy), draft="layerskip:2", draft_tokens=3)
    assert sharing.loop.stats().speculation.draft_tokens > 0


def test_positions_that_close_up(model: Path) -> None:
    compare(model, about("window", positions="cache", every=4))


def test_a_scored_prompt_is_computed_whole(model: Path) -> None:
    serving = Serving(model)
    ask(serving, "first", question(1), about("knorm"))
    ask(serving, "scored", question(1), about("knorm"), prompt_logprobs=0)
    assert cached(serving, "scored") == 0 and len(serving.prompt_logprobs["scored", 0]) == CONTEXT + 6
    serving.check()


def restless(serving: Serving) -> None:
    """Preempt all that run, every third step."""
    scheduler = serving.loop.scheduler
    for number in range(200):
        if not serving.loop.has_work:
            break
        serving.step()
        for sequence in list(scheduler._running if number % 3 == 2 else ()):
            scheduler._preempt(sequence)
    serving.run()


@pytest.mark.parametrize("swap_memory", [0, 2**22])
def test_a_preempted_user_comes_back_as_it_was(model: Path, swap_memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SwapCosts, "swap_pays", lambda *_: True)
    prune = about("kvzip", budget="global", window=1, sinks=0)
    serving, alone = Serving(model, swap_memory=swap_memory), Serving(model, prefix_cache=False)
    ask(serving, "first", question(1), prune)
    for number in range(2, 5):
        serving.submit(str(number), question(number), prune, max_tokens=20)
        ask(alone, str(number), question(number), prune, max_tokens=20)
    restless(serving)
    stats = serving.loop.stats()
    assert stats.preemptions_total >= 6 and stats.lossy_preemptions_total == 0
    assert bool(stats.swap_in_sequences_total) == bool(swap_memory)
    for number in range(2, 5):
        assert_same(serving, alone, str(number))
    serving.check()


def test_it_goes_to_the_host_and_comes_back(model: Path) -> None:
    prune = about("kvzip", budget="ada", window=1, sinks=0)
    serving = Serving(model, kv_memory=24 * 6 * PAGE_BYTES, swap_memory=2**22)
    alone = Serving(model, prefix_cache=False)
    ask(serving, "first", question(1), prune)
    ask(serving, "long", prompt(80, 7), params("knorm", keep=1.0))
    assert all(bundle.pages is None for bundle in serving.loop.scheduler._cache._index if bundle.kept is not None)
    ask(serving, "second", question(2), prune)
    ask(alone, "second", question(2), prune)
    stats = serving.loop.stats()
    assert stats.prefix_host_hits_total >= CONTEXT == stats.prefix_pruned_hits_total
    assert_same(serving, alone, "second")
    serving.check()


def test_in_a_pool_for_one(model: Path) -> None:
    """It is given up, or its pages become the user's own, where a sequence alone could not go on."""
    serving = Serving(model, kv_memory=16 * 6 * PAGE_BYTES)
    for number in range(6):
        prune = about("knorm", keep=(0.4, 0.95)[number % 2], every=0)
        serving.submit(str(number), question(number), prune, max_tokens=15)
    serving.run()
    assert not serving.failed and len(serving.ended) == 6
    serving.check()


@pytest.mark.parametrize("steps", range(1, 9, 2))
def test_cancelled_at_any_moment_it_leaves_nothing_behind(model: Path, steps: int) -> None:
    serving, alone = Serving(model), Serving(model, prefix_cache=False)
    serving.submit("gone", question(1), about("kvzip"))
    serving.submit("stays", question(2), about("kvzip"))
    for _ in range(steps):
        serving.step()
    serving.loop.abort(RequestId("gone"))
    serving.run()
    ask(alone, "stays", question(2), about("kvzip"))
    assert serving.tokens["stays", 0] == alone.tokens["stays", 0]
    serving.check()


def test_the_embedded_model(source: Callable[[int], list[int]]) -> None:
    document, prune = source(300), PruneParams(policy="kvzip", budget="ada", floor=32, window=8, context=300)
    settings: dict[str, Any] = {"page_size": 16, "max_batch_tokens": 512}
    sharing, alone = (Serving(embedded_model(), **settings, prefix_cache=reuse) for reuse in (True, False))
    ask(sharing, "first", [*document, 11, 12], prune)
    for number, tail in enumerate(([20, 21, 22], [30])):
        for serving in (sharing, alone):
            ask(serving, str(number), document + tail, prune, max_tokens=24)
        assert cached(sharing, str(number)) == 300
        assert_same(sharing, alone, str(number))


@pytest.fixture
def source() -> Callable[[int], list[int]]:
    """Tokens of source code."""
    from quire.server.text import Tokenizer

    text = Path(__file__).read_text()
    return lambda count: Tokenizer.load(str(embedded_model())).encode(text)[:count]


def test_a_server_tells_what_it_did_not_prune_again(server: RunningServer) -> None:
    def ask(tail: list[int]) -> tuple[int, dict[str, Any]]:
        prune = {"policy": "kvzip", "floor": 32, "window": 8, "context": 120}
        completion = server.client().completions.create(
            model=MODEL_NAME, prompt=prompt(120) + tail, max_tokens=4, temperature=0, extra_body={"prune": prune}
        )
        usage = completion.usage
        assert usage is not None and usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens or 0, usage.model_dump()["kv_cache"]

    def chat(question: str) -> int:
        prune = {"policy": "kvzip", "floor": 32, "window": 8, "context_messages": 1}
        texts = (Path(__file__).read_text()[:1000], question)
        completion = server.client().chat.completions.create(
            model=MODEL_NAME, messages=[{"role": "user", "content": text} for text in texts], max_tokens=4,
            extra_body={"prune": prune},
        )  # fmt: skip
        assert completion.usage is not None and completion.usage.prompt_tokens_details is not None
        return completion.usage.prompt_tokens_details.cached_tokens or 0

    (none, first), (found, second) = ask([7, 8]), ask([9, 10])
    assert (none, found) == (0, 120) and first == second and first["dropped_entries"] > 50
    assert server.metric("quire:prefix_pruned_hits_total") == 120
    assert chat("Why?") == 0 < 150 < chat("What is it about?")
    assert server.metric("quire:kv_pages_used") == 0 < server.metric("quire:kv_pages_cached")
