"""Grammars are compiled beside the steps: most take a millisecond, but some a second, and who runs need not wait."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ..core.errors import QuireError
from ..core.ids import RequestId
from ..core.request import Grammar, Request


@runtime_checkable
class GrammarCompiler(Protocol):
    """An engine that can bind outputs to grammars."""

    def compile_grammar(self, grammar: Grammar) -> None:
        """So that a sequence bound to it enters at once; on any thread. Raises `InvalidRequestError`, soon too if
        asked again."""
        ...

    def knows_grammar(self, grammar: Grammar) -> bool:
        """Whether that would take no time."""
        ...


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """The request's grammar is compiled, or cannot be."""

    request_id: RequestId


class GrammarGate:
    """Holds requests until their grammars are compiled; for the thread of the steps."""

    def __init__(
        self, engine: object, submit: Callable[[Request], None], done: Callable[[CompiledGrammar], None]
    ) -> None:
        """submit: where requests go on to, which refuses those whose grammars cannot be compiled; `done` is called on
        another thread, and its argument is for `release`."""
        self._engine = engine
        self._submit = submit
        self._done = done
        self._held: dict[RequestId, Request] = {}
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="quire-grammar")

    def submit(self, request: Request) -> None:
        """Let a request through, now or later."""
        grammar, engine = request.grammar, self._engine
        if grammar is None or not isinstance(engine, GrammarCompiler) or engine.knows_grammar(grammar):
            self._submit(request)
            return
        self._held[request.id] = request
        self._pool.submit(self._compile, engine, request.id, grammar)

    def _compile(self, engine: GrammarCompiler, request_id: RequestId, grammar: Grammar) -> None:
        try:
            engine.compile_grammar(grammar)
        except QuireError:
            pass  # said again to who submits it
        finally:
            self._done(CompiledGrammar(request_id))

    def release(self, compiled: CompiledGrammar) -> None:
        """Let the request through, if it is still wanted."""
        request = self._held.pop(compiled.request_id, None)
        if request is not None:
            self._submit(request)

    def abort(self, request_id: RequestId) -> None:
        """The request, if it is held, is not wanted any more."""
        self._held.pop(request_id, None)
