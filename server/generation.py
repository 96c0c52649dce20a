"""From the engine's events to text: per choice deltas, finish reasons, log-probabilities and counts.

All response kinds (completions and chat, streamed and whole) are made from the deltas of `stream_deltas`.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial

from ..core.messages import Event, Finished, FinishReason, Logprob, Recorded, Tokens
from ..core.pruning import CacheUse
from ..core.request import Request
from .metrics import SequenceTimer
from .settings import Service
from .stops import StopFilter
from .text import Tokenizer


@dataclass(frozen=True, slots=True)
class Job:
    """One engine request and how its output is shown."""

    request: Request
    first_index: int
    """Index of its first choice in the response."""
    stops: tuple[str, ...] = ()
    skip_special_tokens: bool = True
    echo: str | None = None
    """The prompt's text, shown before each choice's own."""
    score_only: bool = False
    """Drop the one generated token: only the prompt's log-probabilities are wanted."""


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token and its log-probabilities."""

    token_id: int
    offset: int
    """Characters of the choice's text before the token."""
    logprob: Logprob | None
    """None for the first token of an echoed prompt."""


@dataclass(slots=True)
class Delta:
    """What one event adds to one choice."""

    index: int
    text: str = ""
    tokens: list[ScoredToken] = field(default_factory=list)
    """Log-probabilities, if asked for; a token may come before its text, which a stop string may withhold."""
    num_tokens: int = 0
    """Generated tokens, for the usage."""
    cached_tokens: int = 0
    """With the first choice's first token: prompt tokens that the prefix cache had, for the usage."""
    pinned_tokens: int = 0
    """The same: prompt tokens kept for the time asked for."""
    cache: CacheUse | None = None
    """What the choice holds of its entries by now, if it prunes."""
    finish_reason: FinishReason | None = None


class _Choice:
    """One sequence: decoding, stop strings, counts."""

    def __init__(self, job: Job, number: int, tokenizer: Tokenizer, timer: SequenceTimer | None) -> None:
        self.index = job.first_index + number
        self.finished = False
        self.num_tokens = 0
        self._job = job
        self._timer = timer
        self._detokenizer = tokenizer.detokenizer(job.request.prompt_ids, job.skip_special_tokens)
        self._stops = StopFilter(job.stops)
        self._offset = len(job.echo or "")

    def push(self, event: Tokens) -> Delta:
        """Take new tokens; what follows a stop string is not even counted."""
        delta = Delta(self.index, cache=event.cache)
        if self.index == self._job.first_index:  # the prompt counts once, whatever the number of choices
            delta.cached_tokens = event.cached_tokens
            delta.pinned_tokens = event.pinned_tokens
        if self._timer:
            self._timer.on_tokens(len(event.token_ids))
        for number, token_id in enumerate(event.token_ids):
            if event.logprobs:
                delta.tokens.append(ScoredToken(token_id, self._offset, event.logprobs[number]))
            text = self._detokenizer.push(token_id)
            self._offset += len(text)
            self.num_tokens += 1
            delta.num_tokens += 1
            delta.text += self._stops.push(text, armed=self.num_tokens > self._job.request.params.min_tokens)
            if self._stops.hit is not None:
                delta.finish_reason = self._finish("stop", None)
                break
        return self._shown(delta)

    def end(self, event: Finished) -> Delta:
        """The engine says that the choice is complete: show what was withheld."""
        text = self._stops.push(self._detokenizer.flush(), armed=self.num_tokens > self._job.request.params.min_tokens)
        text += self._stops.flush()
        reason: FinishReason = "stop" if self._stops.hit is not None else event.reason
        return self._shown(Delta(self.index, text, finish_reason=self._finish(reason, event.queue_seconds)))

    def _finish(self, reason: FinishReason, queue_seconds: float | None) -> FinishReason:
        self.finished = True
        if self._timer:
            self._timer.on_end(reason, len(self._job.request.prompt_ids), self.num_tokens, queue_seconds)
        return reason

    def _shown(self, delta: Delta) -> Delta:
        if not self._job.score_only:
            return delta
        reason: FinishReason | None = "length" if delta.finish_reason else None
        return Delta(
            self.index,
            cached_tokens=delta.cached_tokens,
            pinned_tokens=delta.pinned_tokens,
            cache=delta.cache,
            finish_reason=reason,
        )


class RequestOutput:
    """The output of one engine request, choice by choice."""

    def __init__(self, job: Job, tokenizer: Tokenizer, new_timer: Callable[[], SequenceTimer] | None = None) -> None:
        """`new_timer` makes what times a choice; without it nothing is timed (offline)."""
        self._job = job
        self._tokenizer = tokenizer
        choices = range(job.request.params.n)
        self._choices = [_Choice(job, n, tokenizer, new_timer() if new_timer else None) for n in choices]
        self._prompt_logprobs: list[Logprob] = []
        self._held: list[Delta] | None = None if job.echo is None else []
        """Deltas that wait until the echoed prompt is scored; None once it was shown."""

    @property
    def done(self) -> bool:
        """Whether all choices are complete; the engine may still be at work on what a stop string cut off."""
        return all(choice.finished for choice in self._choices)

    @property
    def generating(self) -> bool:
        """Whether a token has come."""
        return any(choice.num_tokens for choice in self._choices)

    def push(self, event: Event) -> list[Delta]:
        """What an event adds to the response."""
        assert isinstance(event, Tokens | Finished), "the client raises what failed"
        choice = self._choices[event.index]
        deltas: list[Delta] = []
        if isinstance(event, Finished):
            if not choice.finished:
                deltas.append(choice.end(event))
        else:
            if event.index == 0 and event.prompt_logprobs:  # each choice scores the same prompt
                self._prompt_logprobs += event.prompt_logprobs
            if event.token_ids and not choice.finished:
                deltas.append(choice.push(event))
        return deltas if self._held is None else self._hold(deltas)

    def _hold(self, deltas: list[Delta]) -> list[Delta]:
        """Keep deltas back until the prompt can be shown before them."""
        assert self._held is not None
        self._held += deltas
        params = self._job.request.params
        scored = params.prompt_logprobs is None or len(self._prompt_logprobs) >= len(self._job.request.prompt_ids) - 1
        if not scored and not self.done:
            return []
        held, self._held = self._held, None
        assert self._job.echo is not None
        scores = self._score_prompt() if params.prompt_logprobs is not None else []
        return [Delta(choice.index, self._job.echo, scores) for choice in self._choices] + held

    def _score_prompt(self) -> list[ScoredToken]:
        """The prompt's tokens; the first one follows nothing and has no log-probability."""
        decoder = self._tokenizer.detokenizer(skip_special_tokens=self._job.skip_special_tokens)
        ids = self._job.request.prompt_ids
        logprobs: list[Logprob | None] = [None, *self._prompt_logprobs]
        logprobs += [None] * (len(ids) - len(logprobs))
        tokens: list[ScoredToken] = []
        offset = 0
        for token_id, logprob in zip(ids, logprobs, strict=True):
            tokens.append(ScoredToken(token_id, offset, logprob))
            offset += len(decoder.push(token_id))
        return tokens


def stream_deltas(service: Service, jobs: Sequence[Job], arrived: float) -> AsyncGenerator[list[Delta], None]:
    """Deltas of all jobs as they come, possibly none at a time; the first item says that a job was admitted.

    Raises `QuireError` on refusal and failure. However it ends, the engine's requests are closed.
    """
    streams = [_run(service, job, arrived) for job in jobs]
    return streams[0] if len(streams) == 1 else _merge(streams)


async def _run(service: Service, job: Job, arrived: float) -> AsyncGenerator[list[Delta], None]:
    output = RequestOutput(job, service.tokenizer, partial(SequenceTimer, service.metrics, arrived))
    entry = service.traffic_log.entry(job.request) if service.traffic_log else None
    try:
        async with aclosing(service.client.generate(entry.request if entry else job.request)) as events:
            async for event in events:
                if entry:
                    entry.take(event)
                if isinstance(event, Recorded):
                    continue
                deltas = output.push(event)
                yield deltas
                if output.done:
                    return
    except (GeneratorExit, asyncio.CancelledError):
        if not output.done:
            service.metrics.aborted(output.generating)
        raise
    finally:
        if entry:
            entry.close()


async def _merge(streams: Sequence[AsyncGenerator[list[Delta], None]]) -> AsyncGenerator[list[Delta], None]:
    """Run several streams at once; the first failure of one ends them all."""
    queue: asyncio.Queue[list[Delta] | Exception | None] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[list[Delta], None]) -> None:
        try:
            async with aclosing(stream):
                async for deltas in stream:
                    queue.put_nowait(deltas)
        except Exception as error:  # handed to the reader, which raises it
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
