"""Grammars are compiled beside the steps: most take a millisecond, some a second, and nobody waits for another's."""

from collections.abc import Callable
from dataclasses import dataclass

from ..core.background import background_pool
from ..core.request import Grammar, Request
from .loop import EngineLoop


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """A grammar is compiled, or cannot be; or nobody wanted it any more."""

    grammar: Grammar


class GrammarGate:
    """Lets requests wait until their grammars are compiled; for the thread of the steps.

    They wait in the scheduler's queue: its limits and deadlines hold for them, and they are aborted there.
    """

    def __init__(self, loop: EngineLoop, done: Callable[[CompiledGrammar], None]) -> None:
        """`done` is called on another thread, and its argument is for `release`."""
        self._loop = loop
        self._done = done
        self._held: dict[str, list[Request]] = {}
        """By the source of the grammar, which is compiled once for all of them."""
        self._pool = background_pool("quire-grammar")

    def submit(self, request: Request) -> None:
        """Queue a request, held if its grammar must be compiled first."""
        grammar = request.grammar
        if grammar is None or self._loop.knows_grammar(grammar):
            self._loop.submit(request)
        elif self._loop.submit(request, held=True):
            self._hold(grammar, [request])

    def _hold(self, grammar: Grammar, requests: list[Request]) -> None:
        begun = grammar.source in self._held
        self._held.setdefault(grammar.source, []).extend(requests)
        if not begun:
            self._pool.submit(self._compile, grammar)

    def _compile(self, grammar: Grammar) -> None:
        """On a thread of the pool, which may have been busy for long: perhaps nobody waits any more."""
        try:
            if any(self._loop.scheduler.knows(request.id) for request in self._held[grammar.source]):
                self._loop.compile_grammar(grammar)
        finally:
            self._done(CompiledGrammar(grammar))

    def release(self, compiled: CompiledGrammar) -> None:
        """Let those run that waited for it, if they are still wanted."""
        grammar, held = compiled.grammar, self._held.pop(compiled.grammar.source)
        held = [request for request in held if self._loop.scheduler.knows(request.id)]
        if held and not self._loop.knows_grammar(grammar):
            self._hold(grammar, held)  # they came when it had just been passed over
            return
        for request in held:
            self._loop.release(request)
