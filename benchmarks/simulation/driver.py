"""Runs the real scheduler and its loop against a simulated engine, in virtual time."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from quire.core.ids import RequestId
from quire.core.messages import Decoded, Failed, Finished, StepEvent, Tokens
from quire.core.request import Request, SamplingParams
from quire.scheduler.config import SchedulerConfig
from quire.scheduler.loop import EngineLoop, scheduler_config
from quire.scheduler.scheduler import Scheduler

from .device import Device
from .engine import PAGE_SIZE, SimulatedEngine, VirtualClock
from .results import Result
from .traffic import Arrivals, Traffic, Turn

_REPORT_STEPS = 500
"""Steps between two calls of the progress callback."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The operator's settings."""

    max_num_seqs: int = 256
    max_batch_tokens: int = 2048
    max_waiting: int = 20_000
    changes: dict[str, Any] = field(default_factory=dict)
    """Other fields of `SchedulerConfig`, by name."""


@dataclass(slots=True)
class _Live:
    """A request under way."""

    turn: Turn
    first: float = math.nan
    """When its first token came."""
    last: float = math.nan
    tokens: int = 0


class Simulation:
    """One run from the first arrival to the last token."""

    def __init__(self, device: Device, traffic: Traffic, limits: Limits) -> None:
        self._clock = VirtualClock()
        engine = SimulatedEngine(device, self._clock, limits.max_num_seqs, device.kv_tokens // PAGE_SIZE)
        self._engine = engine
        self._loop = EngineLoop(engine, Scheduler(_config(engine, limits), clock=self._clock))
        self._arrivals = Arrivals(traffic)
        self._live: dict[RequestId, _Live] = {}
        self._submitted = 0
        self.result = Result(device.name, traffic.tenants, device)
        self.result.warm_up = limits.max_num_seqs

    def run(self, on_progress: Callable[[int], object] = lambda done: None) -> Result:
        """Run to the end; `on_progress` gets the number of requests that ended, now and then."""
        result, steps = self.result, 0
        while self._live or self._arrivals.next_time < math.inf:
            if not self._loop.has_work:
                self._clock.now = max(self._clock.now, self._arrivals.next_time)
            for turn in self._arrivals.due(self._clock.now):
                self._submit(turn)
            before, tokens = self._clock.now, result.tokens
            report = self._loop.step()
            for event in report.events:
                self._take(event)
            result.step(self._clock.now - before, result.tokens - tokens, report.stats.waiting)
            steps += 1
            if steps % _REPORT_STEPS == 0:
                on_progress(result.finished)
        on_progress(result.finished)
        result.close(self._clock.now, self._loop.stats())
        self._loop.scheduler.check_integrity()
        return result

    def _submit(self, turn: Turn) -> None:
        conversation = turn.conversation
        if not conversation.prompt:
            conversation.speak()
        self._submitted += 1
        number = self._submitted
        request = Request(
            id=RequestId(str(number)),
            prompt_ids=conversation.prompt,
            params=SamplingParams(temperature=0.0),
            seed=number,
            **_tenant(turn.tenant),
        )
        self._engine.lengths[number] = len(conversation.prompt) + conversation.output
        self._live[request.id] = _Live(turn)
        self._loop.submit(request)

    def _take(self, event: StepEvent) -> None:
        if isinstance(event, Decoded):
            self._decoded(event)
        elif isinstance(event, Tokens):
            live, now = self._live[event.request_id], self._clock.now
            if live.tokens:
                self.result.itl.add(np.array([now - live.last]))
            else:
                live.first = now
            live.last = now
            live.tokens += len(event.token_ids)
            self.result.tokens += len(event.token_ids)
        elif isinstance(event, Finished):
            self._finish(event)
        elif isinstance(event, Failed):
            self._failed(event)

    def _decoded(self, event: Decoded) -> None:
        live, now = self._live, self._clock.now
        rows = [live[request_id] for request_id in event.request_ids]
        self.result.itl.add(now - np.array([row.last for row in rows]))
        for row, run in zip(rows, event.runs(), strict=True):
            row.last = now
            row.tokens += len(run)
        self.result.tokens += len(event.token_ids)

    def _finish(self, event: Finished) -> None:
        live = self._forget(event.request_id)
        conversation = live.turn.conversation
        assert live.tokens == conversation.output and event.reason == "stop", "tokens were lost"
        self.result.end(
            live.turn.tenant,
            prompt=len(conversation.prompt),
            output=live.tokens,
            ttft=live.first - live.turn.time,
            e2e=live.last - live.turn.time,
        )
        pause = conversation.answered()
        if conversation.turns_left:
            time = self._clock.now + pause
            self._arrivals.put_back(time, Turn(live.turn.tenant, time, conversation))

    def _failed(self, event: Failed) -> None:
        """A full queue sends the client away; it comes again, and its wait counts from its first try."""
        turn = self._forget(event.request_id).turn
        if event.error.kind != "OverloadedError":
            self.result.failures[event.error.kind] += 1
            return
        self.result.refusals += 1
        self._arrivals.put_back(self._clock.now + (event.error.retry_after or 1.0), turn)

    def _forget(self, request_id: RequestId) -> _Live:
        del self._engine.lengths[int(request_id)]
        return self._live.pop(request_id)


def _tenant(number: int) -> dict[str, Any]:
    """Whose request it is, where the scheduler tells tenants apart."""
    return {"tenant": f"tenant{number}"} if "tenant" in Request.__struct_fields__ else {}


def _config(engine: SimulatedEngine, limits: Limits) -> SchedulerConfig:
    base = scheduler_config(
        engine.info,
        max_num_seqs=limits.max_num_seqs,
        max_batch_tokens=limits.max_batch_tokens,
        max_waiting=limits.max_waiting,
    )
    fields = {name: getattr(base, name) for name in SchedulerConfig.__dataclass_fields__}
    return SchedulerConfig(**fields | limits.changes)
