"""Requests wait beside the steps until their grammars are compiled; and sequences end where their grammars do."""

import threading
from queue import SimpleQueue
from typing import Any

import numpy as np

from quire.core.errors import InvalidRequestError
from quire.core.ids import RequestId
from quire.core.messages import Finished, Tokens, single_events
from quire.core.plan import BatchPlan, SequenceOutput, StepOutput
from quire.core.request import Grammar, Request, SamplingParams
from quire.scheduler.grammar_gate import CompiledGrammar, GrammarGate
from quire.scheduler.scheduler import Scheduler

from .world import EOS, make_config

SLOW, BROKEN = Grammar("regex", "slow"), Grammar("regex", "broken")


class Compiler:
    """Takes until it may, once for each grammar."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.known: set[str] = set()

    def knows_grammar(self, grammar: Grammar) -> bool:
        return grammar.source in self.known

    def compile_grammar(self, grammar: Grammar) -> None:
        assert self.may.wait(10)
        self.known.add(grammar.source)
        if grammar is BROKEN:
            raise InvalidRequestError("broken")


def request(name: str, grammar: Grammar | None = None, **params: int | bool) -> Request:
    values = SamplingParams(**({"max_tokens": 4} | params))  # type: ignore[arg-type]
    return Request(id=RequestId(name), prompt_ids=(5, 6), params=values, grammar=grammar)


def test_who_needs_no_compiling_goes_first() -> None:
    compiler, done = Compiler(), SimpleQueue[CompiledGrammar]()
    passed: list[str] = []
    gate = GrammarGate(compiler, lambda request: passed.append(request.id), done.put)
    for name, grammar in (("a", SLOW), ("b", None), ("c", BROKEN), ("d", SLOW)):
        gate.submit(request(name, grammar))
    gate.abort(RequestId("d"))
    gate.abort(RequestId("nobody"))
    assert passed == ["b"]
    compiler.may.set()
    for _ in range(3):
        gate.release(done.get(timeout=10))
    gate.submit(request("e", SLOW))
    assert passed == ["b", "a", "c", "e"]


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
