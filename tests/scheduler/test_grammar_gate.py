"""Requests wait beside the steps until their grammars are compiled; and sequences end where their grammars do."""

import threading
from queue import SimpleQueue

from quire.core.errors import InvalidRequestError
from quire.core.ids import RequestId
from quire.core.messages import Finished, single_events
from quire.core.plan import SequenceOutput, StepOutput
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
        assert end is not None and (end.reason, end.stop_token_id) == ("stop", None)
    end = finished(SequenceOutput((EOS,), ended=True), min_tokens=3)
    assert end is not None and (end.reason, end.stop_token_id) == ("stop", EOS)
    cut = finished(SequenceOutput((7,)), max_tokens=1)
    assert cut is not None and cut.reason == "length"


def test_who_is_bound_never_decodes_in_columns() -> None:
    """What comes next takes knowing what came before, so nothing is planned ahead of it."""
    scheduler = Scheduler(make_config())
    scheduler.add(request("r", SLOW))
    for _ in range(3):
        plan = scheduler.plan()
        assert plan is not None and len(plan.sequences) == 1 and not len(plan.decodes)
        assert scheduler.look_ahead() is None
        scheduler.commit(plan, StepOutput((SequenceOutput((7,)),)))
