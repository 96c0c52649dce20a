"""The step loop: plan, compute, commit. One thread owns it; the same loop serves a process and the offline API.

Where the engine computes while the host goes on, the loop launches step n + 1 before it asks for the results of step
n, if the scheduler can plan it by then:

    host     plan 1  plan 2        commit 1  plan 3        commit 2  plan 4  ...
    device           step 1 ------------ step 2 ----------------- step 3 -----

So planning, committing and all that a report takes cost no time of the device's. Else it is one step after the other.
"""

import time
from collections import deque
from contextlib import suppress
from typing import Any, Protocol, TypeVar, runtime_checkable

import msgspec

from ..core.errors import InvalidRequestError, QuireError, describe
from ..core.ids import RequestId
from ..core.messages import EngineInfo, EngineStats, Failed, GrammarCounts, StepEvent, StepReport
from ..core.plan import BatchPlan, StepOutput
from ..core.request import Grammar, Request
from .scheduler import Scheduler, SchedulerConfig

Launched = TypeVar("Launched")


class StepEngine(Protocol[Launched]):
    """What the loop needs of an engine; `engine.engine.Engine` fulfils it, tests simulate it."""

    @property
    def info(self) -> EngineInfo:
        """What the engine settled on when it was loaded."""
        ...

    @property
    def is_asynchronous(self) -> bool:
        """Whether `launch` returns before the batch is computed."""
        ...

    def launch(self, plan: BatchPlan) -> Launched:
        """Begin to compute one batch; while another is in flight only if both are nothing but decodes."""
        ...

    def finish(self, launched: Launched) -> StepOutput:
        """Wait for a batch, in the order of their launches."""
        ...


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

    def grammar_counts(self) -> GrammarCounts:
        """Of what was compiled and forced."""
        ...


class EngineLoop:
    """Drives a scheduler and an engine, step by step."""

    def __init__(self, engine: StepEngine[Any], scheduler: Scheduler, looks_ahead: bool | None = None) -> None:
        """looks_ahead: whether the next step is launched while one is in flight; None: if that saves time."""
        self.engine = engine
        self.scheduler = scheduler
        self.looks_ahead = engine.is_asynchronous if looks_ahead is None else looks_ahead
        self._in_flight: deque[tuple[BatchPlan, Any]] = deque()
        self._refused: list[StepEvent] = []
        self._step_seconds = 0.0
        self._forward_seconds = 0.0
        self._grammar_seconds = 0.0
        self._compiler = engine if isinstance(engine, GrammarCompiler) else None
        self._grammars_found = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would report anything."""
        return self.scheduler.has_work or bool(self._refused)

    def submit(self, request: Request, held: bool = False) -> bool:
        """Queue a request; a refusal is reported as `Failed` by the next step. Returns whether it was taken.

        held: it waits like any other, but for `release`.
        """
        try:
            if request.grammar is not None and not held:
                self._grammars_found += self.knows_grammar(request.grammar)
                self._compile(request.grammar)
            self.scheduler.add(request, held)
        except QuireError as error:
            self._refused.append(Failed(request.id, describe(error)))
            return False
        return True

    def release(self, request: Request) -> None:
        """The grammar of a request that was held is compiled, or cannot be; fine if it has ended meanwhile."""
        if not self.scheduler.knows(request.id) or request.grammar is None:
            return
        try:
            self._compile(request.grammar)
            self.scheduler.release(request.id)
        except QuireError as error:
            self.scheduler.abort(request.id)
            self._refused.append(Failed(request.id, describe(error)))

    def knows_grammar(self, grammar: Grammar) -> bool:
        """Whether a request that is bound to it need not be held: it runs, or is refused, at once."""
        return self._compiler is None or self._compiler.knows_grammar(grammar)

    def compile_grammar(self, grammar: Grammar) -> None:
        """So that it is known, unless it cannot be compiled; on any thread."""
        with suppress(QuireError):
            self._compile(grammar)

    def _compile(self, grammar: Grammar) -> None:
        """Raises `InvalidRequestError`."""
        if self._compiler is None:
            raise InvalidRequestError("this engine binds no output to a grammar")
        self._compiler.compile_grammar(grammar)

    def abort(self, request_id: RequestId) -> None:
        """Forget a request in whatever state; unknown ids are fine."""
        self.scheduler.abort(request_id)

    def step(self) -> StepReport:
        """Complete one step if there is work; the report carries its events and the state after it.

        Without work it is a heartbeat, which looks for leaked pages.
        """
        events, self._refused = self._refused, []
        started = time.perf_counter()
        events += self.scheduler.tend()
        if self.scheduler.has_work:
            if not self._in_flight:
                self._launch(self.scheduler.plan())
            if self._in_flight and self.looks_ahead:
                self._launch(self.scheduler.look_ahead())
            if self._in_flight:
                plan, launched = self._in_flight.popleft()
                output = self.engine.finish(launched)
                events += self.scheduler.commit(plan, output)
                self._forward_seconds = output.forward_seconds
                self._grammar_seconds += output.grammar_seconds
            self._step_seconds = time.perf_counter() - started
        if not self.scheduler.has_work:
            self.scheduler.reclaim_leaks()
        return StepReport(events, self.stats())

    def _launch(self, plan: BatchPlan | None) -> None:
        if plan is not None:
            self._in_flight.append((plan, self.engine.launch(plan)))

    def stats(self) -> EngineStats:
        """The scheduler's counters with the last step's times."""
        counts = GrammarCounts() if self._compiler is None else self._compiler.grammar_counts()
        return msgspec.structs.replace(
            self.scheduler.stats(),
            step_seconds=self._step_seconds,
            forward_seconds=self._forward_seconds,
            grammar_seconds_total=self._grammar_seconds,
            grammars=msgspec.structs.replace(counts, found=self._grammars_found),
        )


def scheduler_config(
    info: EngineInfo,
    *,
    max_num_seqs: int,
    max_batch_tokens: int,
    max_waiting: int,
    prefix_cache: bool = True,
    max_cache_ttl: float = 3600.0,
    prunes_under_pressure: bool = False,
    policy: str = "fcfs",
    max_itl: float | None = None,
    max_waiting_tokens: int | None = None,
    queue_timeout: float | None = None,
) -> SchedulerConfig:
    """The scheduler's slice of what the engine settled on and the operator asked for."""
    return SchedulerConfig(
        num_pages=info.num_pages,
        page_size=info.page_size,
        num_layers=info.model.num_layers,
        num_kv_heads=info.model.num_kv_heads,
        windows=info.model.windows,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_batch_tokens,
        max_waiting=max_waiting,
        max_model_len=info.max_model_len,
        max_stream_len=info.max_stream_len,
        vocab_size=info.model.vocab_size,
        eos_token_ids=info.model.eos_token_ids,
        model=info.model.name,
        rope_length=info.model.rope_length,
        prefix_cache=prefix_cache,
        num_host_pages=info.num_host_pages,
        page_bytes=info.kv_bytes // info.num_pages,
        max_cache_ttl=max_cache_ttl,
        policies=info.policies,
        refinements=info.refinements,
        prunes_under_pressure=prunes_under_pressure,
        policy=policy,
        max_itl=max_itl,
        max_waiting_tokens=max_waiting_tokens,
        queue_timeout=queue_timeout,
        draft=info.draft,
    )
