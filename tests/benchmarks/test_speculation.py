"""The yardstick of speculation: which steps count, what is made of them, and what is asked of the engine."""

import argparse
import re
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from benchmarks.speculation import (
    Cell,
    Engines,
    Round,
    agreement,
    measure,
)
from benchmarks.steady import Steady, Watcher, difference
from benchmarks.workloads import WORKLOADS, Workloads, edit_prompt, has_chat, names_in, request
from quire.core.config import embedded_model
from quire.core.ids import RequestId
from quire.core.messages import EngineStats, Event, Finished, StepEvent, StepReport, Tokens
from quire.core.request import Request, SeedSource
from quire.core.speculation import SpeculationCounts
from quire.server.text import Tokenizer


def report(forward: float, drafted: float, *events: Event) -> StepReport:
    counts = SpeculationCounts(draft_seconds=drafted)
    return StepReport(list(events), EngineStats(forward_seconds=forward, speculation=counts))


def says(name: str, *tokens: int) -> Tokens:
    return Tokens(RequestId(name), 0, list(tokens))


def test_steps_count_while_all_generate() -> None:
    watcher = Watcher(2, SpeculationCounts(draft_seconds=5.0), Steady())
    end: Event = Finished(RequestId("a"), 0, "length")
    watcher.watch(report(1.0, 5.0, says("a", 1)), 9.0)  # b is still at its prompt
    watcher.watch(report(1.0, 5.5, says("a", 2), says("b", 1)), 9.0)  # b computed the end of its prompt
    watcher.watch(report(0.5, 5.7, says("a", 3, 4, 5), says("b", 2)), 1.0)
    watcher.watch(report(0.5, 6.0, says("a", 6, 7), end, says("b", 3)), 3.0)
    watcher.watch(report(1.0, 7.0, says("b", 4)), 9.0)  # b alone
    assert watcher.tokens == {"a": [1, 2, 3, 4, 5, 6, 7], "b": [1, 2, 3, 4]}
    steady = watcher.steady
    assert (steady.tokens, steady.seconds, steady.forward_seconds) == (7, 4.0, 1.0)
    assert (steady.rate, steady.draft_share) == (1.75, pytest.approx(0.5 / 4))
    assert (steady.steps, steady.forward) == (2, 0.5)
    assert steady.rest_share == pytest.approx(1 - 1.5 / 4)


def test_counts_are_those_in_between() -> None:
    before = SpeculationCounts(drafts=2, draft_tokens=4, accepted_tokens=1, accepted_per_position=[1], lengths=[3])
    now = SpeculationCounts(
        drafts=6, draft_tokens=12, accepted_tokens=6, accepted_per_position=[4, 2], lengths=[4, 0, 4], draft_seconds=0.5
    )
    found = difference(now, before)
    assert (found.drafts, found.draft_tokens, found.accepted_tokens, found.draft_seconds) == (4, 8, 5, 0.5)
    assert (found.accepted_per_position, found.lengths) == ([3, 2], [1, 0, 4])


def test_figures_of_a_cell() -> None:
    def one(rate: int, plain: int, accepted: list[int], lengths: list[int]) -> Round:
        counts = SpeculationCounts(
            drafts=10, accepted_tokens=sum(accepted), accepted_per_position=accepted, lengths=lengths
        )
        return Round(Steady(rate, 1.0), Steady(plain, 1.0), counts, 1.0)

    rounds = [one(30, 10, [8, 4], [0, 0, 10]), one(20, 10, [6], [5, 5]), one(60, 10, [10, 6], [0, 0, 10])]
    cell = Cell("ngram", "auto", "code", 1, rounds)
    assert (cell.speedup, cell.rate) == (3.0, 30.0)
    assert cell.per_draft == pytest.approx(1 + 34 / 30)
    assert cell.accepted == [pytest.approx(24 / 30), pytest.approx(10 / 30)]
    assert cell.asked == pytest.approx((5 + 2 * 20) / 30)
    idle = Cell("ngram", "auto", "code", 1, [Round(Steady(1, 1.0), Steady(1, 1.0), SpeculationCounts(), 1.0)])
    assert (idle.per_draft, idle.accepted, idle.asked) == (1.0, [], 0.0)
    assert agreement([[1, 2], [3, 4]], [[1, 9], [3, 4]]) == 0.75


@dataclass
class FakeLoop:
    """Says two tokens a step with a drafter and one without."""

    drafts: bool
    turns: list[bool]
    requests: list[Request] = field(default_factory=list)
    said: int = 0
    counts: SpeculationCounts = field(default_factory=SpeculationCounts)
    scheduler: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(speculation=None))

    def submit(self, request: Request) -> None:
        self.requests.append(request)
        self.turns.append(self.drafts)

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def stats(self) -> EngineStats:
        return EngineStats(speculation=self.counts)

    def step(self) -> StepReport:
        [asked] = self.requests
        count = min(1 + self.drafts, (asked.params.max_tokens or 0) - self.said)
        if self.drafts:
            drafts = self.counts.drafts + 1
            self.counts = SpeculationCounts(drafts=drafts, accepted_tokens=drafts, accepted_per_position=[drafts])
        self.said += count
        events: list[StepEvent] = [Tokens(asked.id, 0, [7] * count)]
        if self.said == asked.params.max_tokens:
            events.append(Finished(asked.id, 0, "length"))
            self.requests, self.said = [], 0
        return StepReport(events, self.stats())


def test_rounds_take_turns_and_the_first_is_not_counted() -> None:
    turns: list[bool] = []
    cell, engines = Cell("ngram", "1", "code", 1), Engines(FakeLoop(True, turns), FakeLoop(False, turns))  # type: ignore[arg-type]
    batches = [[[1, 2, 3]], [[4, 5]]]
    measure(engines, cell, batches, argparse.Namespace(output=9, temperature=0.0, rounds=2))
    assert turns == [False, True] * 2 + [True, False] * 2 + [False, True] * 2
    assert len(cell.rounds) == 2 and cell.rounds[0].equal == 1.0
    # Of nine tokens the first one's step is not counted.
    sides = [(one.on.tokens / one.on.steps, one.off.tokens / one.off.steps) for one in cell.rounds]
    assert sides == [(7 / 4, 1.0)] * 2 and cell.per_draft == 2.0


def test_prompts_are_what_they_say() -> None:
    tokenizer = Tokenizer.load(str(embedded_model()))
    assert has_chat(tokenizer)
    first, again = (Workloads(tokenizer, seed=3) for _ in range(2))
    drawn = {kind: first.take(kind, 200) for kind in WORKLOADS}
    assert {kind: again.take(kind, 200) for kind in WORKLOADS} == drawn
    assert len(drawn["code"]) == 200
    edit = tokenizer.decode(drawn["edit"])
    match = re.search(r"\n\n# The same with (\w+) renamed to (\w+):\n\n", edit)
    assert match and match[1] in edit[: match.start()] and match[1] not in edit[match.end() :]
    chat = tokenizer.decode(drawn["chat"], skip_special_tokens=False)
    assert chat.count("<|im_start|>user") == 2 and chat.endswith("<|im_start|>assistant\n")


def test_an_edit_renames_whole_words() -> None:
    source = "size = 1\nresize(size)\nreturn size\nprint()\n"
    assert names_in(source) == ["size"]
    prompt = edit_prompt(source, "size", "width")
    assert prompt == source + "\n\n# The same with size renamed to width:\n\nwidth = 1\nresize(width)\nreturn width\n"


def test_a_request_has_no_seed_of_its_own() -> None:
    one = request([1, 2], 5, 0.8, SeedSource())
    assert (one.params.seed, one.params.max_tokens, one.params.temperature, one.speculate) == (None, 5, 0.8, True)
