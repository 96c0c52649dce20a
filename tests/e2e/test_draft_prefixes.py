"""What a draft model computed for one request serves others, between the same borders as the target's prefixes."""

from pathlib import Path
from typing import Any

import pytest
import transformers

from quire.core.request import Request
from quire.core.speculation import DraftInfo
from quire.scheduler.loop import EngineLoop

from .speculating import PAGE, Run, Stack, assert_equal, request, save, save_like
from .test_parity import GQA
from .test_prefix import tokens

PROMPT = tokens(41, seed=1)
"""Ten blocks and a token."""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Stack:
    return Stack(save(tmp_path_factory.mktemp("target"), transformers.LlamaConfig(**GQA)))


@pytest.fixture
def draft(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> DraftInfo:
    """A draft with an empty cache."""
    return stack.draft(str(save_like(tmp_path_factory.mktemp("draft"), Path(stack.settings.model))))


def ask(name: str, prompt: list[int], **settings: Any) -> Request:
    return request(name, prompt, temperature=0.0, **settings)


def taken(stack: Stack, loop: EngineLoop, *requests: Request) -> tuple[Run, int, int]:
    """The run, and how many tokens the draft took from its cache and computed for these requests together."""
    before = loop.stats().speculation
    run = stack.serve(requests, loop=loop)
    now = run.counts
    return run, now.cached_tokens - before.cached_tokens, now.computed_tokens - before.computed_tokens


def test_turns_of_a_dialogue_and_what_they_say(stack: Stack, draft: DraftInfo) -> None:
    loop, plain = stack.loop(draft), stack.loop()
    prompt = list(PROMPT)
    for turn in range(3):
        mine = ask(f"turn {turn}", prompt)
        run, cached, computed = taken(stack, loop, mine)
        assert_equal(run.told, stack.serve([mine], loop=plain).told)
        # All of the turn before, but for the last drafts that were right and a block that was not full.
        assert cached % PAGE == 0 and (cached >= len(prompt) - 5 - 2 * PAGE if turn else cached == 0)
        assert computed <= len(prompt) + 24 - cached
        prompt = [*prompt, *run.told[mine.id, 0].tokens, *tokens(5, seed=turn)]


def test_salts_keep_drafts_apart_too(stack: Stack, draft: DraftInfo) -> None:
    loop = stack.loop(draft)
    assert taken(stack, loop, ask("a", PROMPT, cache_salt="one"))[1] == 0
    assert taken(stack, loop, ask("b", PROMPT, cache_salt="other"))[1] == 0
    assert taken(stack, loop, ask("c", PROMPT, cache_salt="one", namespace="key"))[1] == 0
    assert taken(stack, loop, ask("d", PROMPT, cache_salt="one"))[1] >= 40


def test_without_prefix_cache_only_choices_of_one_request_share(stack: Stack, draft: DraftInfo) -> None:
    loop = stack.loop(draft, prefix_cache=False)
    assert taken(stack, loop, ask("a", PROMPT))[1] == 0
    assert taken(stack, loop, ask("b", PROMPT))[1] == 0
    run, cached, _ = taken(stack, loop, request("c", PROMPT, n=3, temperature=1.3, seed=3))
    assert cached >= 80 and len(run.told) == 3


def test_the_scheduler_knows_what_the_draft_has_seen(stack: Stack, draft: DraftInfo) -> None:
    loop = stack.loop(draft)
    for name, seen in (("a", 0), ("b", 40)):
        loop.submit(ask(name, PROMPT))
        loop.step()
        (sequence,) = loop.scheduler._running
        assert loop.scheduler.speculation is not None and sequence.slot is not None
        sources = loop.scheduler.speculation.lengths.sources
        assert sources._recalled[sequence.slot] == seen
        while loop.has_work:
            loop.step()
