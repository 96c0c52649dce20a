"""Requests wait beside the steps until their grammars are compiled; and sequences end where their grammars do."""

import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any, cast

import numpy as np
import pytest

from quire.core.errors import InvalidRequestError
from quire.core.ids import RequestId
from quire.core.messages import Failed, Finished, GrammarCounts, Tokens, single_events
from quire.core.plan import BatchPlan, SequenceOutput, StepOutput
from quire.core.request import Grammar, Request, SamplingParams
from quire.scheduler.grammar_gate import CompiledGrammar, GrammarGate
from quire.scheduler.loop import EngineLoop
from quire.scheduler.scheduler import Scheduler, SchedulerConfig

from .fake_engine import FakeEngine
from .world import EOS, FakeClock, make_config

SLOW, BROKEN, QUICK = Grammar("regex", "slow"), Grammar("regex", "broken"), Grammar("regex", "quick")


class Compiler(FakeEngine):
    """Takes until it may, but for `QUICK`, and is asked once for each grammar."""

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self.may = threading.Event()
        self.compiled: list[str] = []

    def knows_grammar(self, grammar: Grammar) -> bool:
        return grammar.source in self.compiled

    def compile_grammar(self, grammar: Grammar) -> None:
        assert grammar.source == "quick" or self.may.wait(10)
        if grammar.source not in self.compiled:
            self.compiled.append(grammar.source)
        if grammar.source == "broken":
            raise InvalidRequestError("broken")

    def grammar_counts(self) -> GrammarCounts:
        return GrammarCounts(compiled=len(self.compiled))


class Gated:
    """A gate before a loop."""

    def __init__(self, **settings: Any) -> None:
        config, self.clock = make_config(**settings), FakeClock()
        self.compiler = Compiler(config)
        self.scheduler = Scheduler(config, self.clock)
        self.loop = EngineLoop(cast(Any, self.compiler), self.scheduler)
        self.done = SimpleQueue[CompiledGrammar]()
        self.gate = GrammarGate(self.loop, self.done.put)
        self.ended: dict[str, str] = {}
        """What became of requests: `FinishReason`, or the kind and the text of the error."""

    def submit(self, name: str, grammar: Grammar | None = None, timeout: float | None = None, **params: int) -> None:
        self.gate.submit(request(name, grammar, timeout, **params))

    def step(self) -> None:
        for event in single_events(self.loop.step().events):
            if isinstance(event, Finished):
                self.ended[event.request_id] = event.reason
            elif isinstance(event, Failed):
                self.ended[event.request_id] = f"{event.error.kind}: {event.error.message}"
        self.scheduler.check_integrity()

    def release(self) -> None:
        self.gate.release(self.done.get(timeout=10))
        self.scheduler.check_integrity()

    def run(self) -> None:
        while self.loop.has_work:
            self.step()


@pytest.fixture
def gated() -> Iterator[Gated]:
    world = Gated()
    yield world
    world.compiler.may.set()


def request(name: str, grammar: Grammar | None = None, timeout: float | None = None, **params: int | bool) -> Request:
    values = SamplingParams(**({"max_tokens": 4} | params))  # type: ignore[arg-type]
    return Request(id=RequestId(name), prompt_ids=(5, 6), params=values, grammar=grammar, timeout=timeout)


def test_nobody_waits_for_anothers_grammar(gated: Gated) -> None:
    slow = [(f"slow {number}", Grammar("regex", f"slow {number}")) for number in range(9)]
    for name, grammar in (*slow, ("broken", BROKEN), ("free", None), ("quick", QUICK)):
        gated.submit(name, grammar)
    gated.release()
    gated.run()
    assert gated.ended.keys() == {"free", "quick"} and not gated.loop.has_work
    stats = gated.loop.stats()
    assert (stats.waiting, stats.held, stats.grammars.compiled, stats.grammars.found) == (10, 10, 1, 0)
    gated.compiler.may.set()
    for _ in range(10):
        gated.release()
    gated.submit("once more", QUICK)
    gated.submit("again", BROKEN)
    gated.run()
    stats = gated.loop.stats()
    assert (stats.waiting, stats.held, stats.grammars.compiled, stats.grammars.found) == (0, 0, 11, 2)
    refused = {name for name, end in gated.ended.items() if end == "InvalidRequestError: broken"}
    assert refused == {"broken", "again"} and len(gated.ended) == 14


def test_who_is_held_keeps_its_place(gated: Gated) -> None:
    gated.submit("first", SLOW)
    gated.submit("second", SLOW)
    gated.loop.submit(request("third"))
    gated.compiler.may.set()
    gated.release()
    assert [sequence.request.id for sequence in gated.scheduler._waiting] == ["first", "second", "third"]


def test_who_is_held_is_late_like_all_who_wait() -> None:
    gated = Gated(queue_timeout=5.0)
    gated.submit("late", SLOW)
    gated.submit("later", SLOW, timeout=2.0)
    gated.step()
    gated.clock.now += 3.0
    gated.step()
    assert gated.ended.keys() == {"later"} and gated.ended["later"].startswith("RequestTimeoutError")
    gated.clock.now += 3.0
    gated.step()
    assert "RequestTimeoutError: the request waited 5 s in the queue" in gated.ended["late"]
    assert gated.loop.stats().timeouts_total == {"queue": 1, "request": 1} and gated.loop.stats().held == 0
    gated.compiler.may.set()
    gated.release()
    assert not gated.loop.has_work


def test_who_is_held_takes_a_place_in_the_queue() -> None:
    gated = Gated(max_waiting=3)
    gated.submit("a", SLOW, n=2)
    gated.submit("b", BROKEN)
    gated.submit("c", Grammar("regex", "another"))
    gated.submit("d")
    gated.submit("a", QUICK)
    gated.step()
    assert gated.ended["a"].startswith("InvalidRequestError: a request with the id")
    assert all(gated.ended[name].startswith("OverloadedError") for name in "cd")
    gated.compiler.may.set()
    for _ in range(2):
        gated.release()
    gated.run()
    assert sorted(gated.compiler.compiled) == ["broken", "slow"] and gated.ended["a"] == "length"


def test_who_is_aborted_leaves_at_once_and_nothing_is_compiled_for_it(
    gated: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()
    compile_all = gated.gate._compile
    monkeypatch.setattr(gated.gate, "_compile", lambda grammar: (begun.wait(10), compile_all(grammar)))
    for name in "ab":
        gated.submit(name, QUICK)
        gated.loop.abort(RequestId(name))
    assert not gated.loop.stats().waiting
    begun.set()
    passed_over = gated.done.get(timeout=10)
    gated.submit("c", QUICK)
    assert not gated.compiler.compiled
    gated.gate.release(passed_over)
    gated.release()
    gated.run()
    assert gated.ended == {"c": "length"} and gated.compiler.compiled == ["quick"]


def finished(result: SequenceOutput, **params: int | bool) -> Finished | None:
    """How a bound sequence ends by its first step, if it does."""
    scheduler = Scheduler(make_config())
    scheduler.add(request("r", SLOW, **params))
    plan = scheduler.plan()
    assert plan is not None and plan.assignments[0].grammar is SLOW
    *_, event = single_events(scheduler.commit(plan, StepOutput((result,))))
    scheduler.check_integrity()
    assert scheduler.has_work != isinstance(event, Finished)
    return event if isinstance(event, Finished) else None


def test_where_the_grammar_ends_the_sequence_does() -> None:
    assert finished(SequenceOutput((7,))) is None
    for params in ({}, {"max_tokens": 1}, {"min_tokens": 3}, {"ignore_eos": True}):
        end = finished(SequenceOutput((7,), ended=True), **params)
        assert end is not None and end.reason == "stop"
    end = finished(SequenceOutput((EOS,), ended=True), min_tokens=3)
    assert end is not None and end.reason == "stop"
    cut = finished(SequenceOutput((7,)), max_tokens=1)
    assert cut is not None and cut.reason == "length"


def test_nothing_is_planned_ahead_of_who_is_bound() -> None:
    """Its token must be known first; so while it is there nobody's step is."""
    scheduler = Scheduler(make_config())
    scheduler.add(request("bound", SLOW, max_tokens=5))
    scheduler.add(request("free", max_tokens=40))
    first = scheduler.plan()
    assert first is not None
    scheduler.commit(first, StepOutput((SequenceOutput((7,)), SequenceOutput((7,)))))
    ahead = []
    for step in range(8):
        plan = scheduler.plan()
        assert plan is not None and not plan.sequences and len(plan.decodes) == (2 if step < 4 else 1)
        following = scheduler.look_ahead()
        ahead.append(following is not None)
        for one in (plan, *([following] if following else [])):
            scheduler.commit(one, StepOutput((), decoded=np.full(len(one.decodes), 7, np.int32)))
        scheduler.check_integrity()
    assert ahead == [False] * 4 + [True] * 4


def test_forced_tokens_are_told_and_computed_together() -> None:
    scheduler = Scheduler(make_config())
    for name in ("a", "b"):
        scheduler.add(request(name, SLOW, max_tokens=9))
    told: dict[str, list[int]] = {"a": [], "b": []}

    def step(*outputs: SequenceOutput, apart: dict[int, SequenceOutput] | None = None) -> tuple[BatchPlan, list[Any]]:
        plan = scheduler.plan()
        assert plan is not None
        decoded = np.full(len(plan.decodes), 7, np.int32)
        events = [*single_events(scheduler.commit(plan, StepOutput(outputs, decoded=decoded, apart=apart or {})))]
        for event in events:
            if isinstance(event, Tokens):
                told[event.request_id] += event.token_ids
        scheduler.check_integrity()
        return plan, [event for event in events if isinstance(event, Finished)]

    step(SequenceOutput((7,)), SequenceOutput((7,), forced=(8, 9)))
    plan, _ = step(SequenceOutput((5,)), apart={0: SequenceOutput((7,), forced=(6,))})
    assert [part.token_ids for part in plan.sequences] == [(7, 8, 9)] and plan.sequences[0].sample
    plan, _ = step(SequenceOutput((4,)), apart={0: SequenceOutput((7,), forced=(3, 3), ended=True)})
    assert [part.token_ids for part in plan.sequences] == [(7, 6)] and plan.decodes.token_ids.tolist() == [5]
    assert told == {"a": [7, 7, 6, 4], "b": [7, 8, 9, 5, 7, 3, 3]}
    assert list(scheduler._requests) == ["a"], "the other grammar ended behind its forced tokens"
    _, (end,) = step(apart={0: SequenceOutput((7,), forced=(6,) * 32)})
    assert told["a"] == [7, 7, 6, 4, 7, 6, 6, 6, 6] and end.reason == "length"
