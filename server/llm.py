"""The offline API: `LLM(model).generate(prompts, params)`, on the server's scheduler and engine, in this process."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..core.config import EngineConfig, embedded_model
from ..core.errors import InvalidRequestError, revive
from ..core.ids import RequestId
from ..core.messages import EngineInfo, EngineStats, Event, Failed, FinishReason, Logprob, Tokens, single_events
from ..core.pruning import CacheUse, PruneParams
from ..core.request import Grammar, Request, SamplingParams, SeedSource
from ..scheduler.client import load_in_process
from .generation import Job, RequestOutput
from .grammars import structured_outputs as read_outputs
from .text import Tokenizer

__all__ = ["LLM", "Choice", "Completion", "PruneParams", "SamplingParams"]

_NO_LIMIT = 2**31
"""Nobody else waits here: all prompts of a call are queued at once."""
_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("{task.fields[rate]:,.0f} tokens/s"),
    TimeRemainingColumn(),
)


@dataclass(slots=True)
class Choice:
    """One completion of a prompt."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    """All that were generated, an end token and the tokens of a stop string included."""
    finish_reason: FinishReason = "length"
    logprobs: list[Logprob] = field(default_factory=list)
    """One per token if asked for."""
    cache: CacheUse | None = None
    """Entries per head that it held at its end and had dropped, if it was pruned."""


@dataclass(slots=True)
class Completion:
    """What a prompt gave."""

    prompt_ids: list[int]
    choices: list[Choice]
    """`params.n` of them."""
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    """From the second prompt token on, if asked for."""


class LLM:
    """A model, loaded once; for one thread."""

    def __init__(self, model: str | Path | None = None, *, seed: int | None = None, **settings: Any) -> None:
        """Load a checkpoint folder or hub name, the embedded model by default.

        seed makes the draws of requests without a seed of their own repeatable;
        settings are fields of `core.config.EngineConfig` (device, dtype, kv_memory in bytes, ...). Raises `QuireError`
        where the model or the settings cannot work.
        """
        config = EngineConfig.of({"model": str(model or embedded_model()), "max_waiting": _NO_LIMIT, **settings})
        self.tokenizer = Tokenizer.load(config.model, config.trust_remote_code)
        self._loop = load_in_process(config)
        self._seeds = SeedSource(seed)
        self._served = 0
        self._prune = config.prune

    @property
    def info(self) -> EngineInfo:
        """What the engine settled on."""
        return self._loop.engine.info

    @property
    def stats(self) -> EngineStats:
        """Counters of scheduler and engine, up to now."""
        return self._loop.stats()

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008 - frozen
        *,
        stop: str | Sequence[str] = (),
        prune: PruneParams | None = None,
        speculate: bool = True,
        structured_outputs: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> list[Completion]:
        """Complete one prompt or several (texts or token ids), batched together; results are in the prompts' order.

        params: one for all, or one per prompt; stop: text or texts that end a completion and are cut off; prune: how
        their KV cache is pruned, by default as the settings say; speculate: whether their tokens may be drafted, where
        the settings name a drafter (`draft`); structured_outputs: what they must look like, as the API has it, for
        example `{"json": schema}` or `{"regex": "[a-z]+"}`. Raises `QuireError` when a prompt cannot be served, before
        any is computed, or its computation fails.
        """
        listed = _listed(prompts)
        all_params = [params] * len(listed) if isinstance(params, SamplingParams) else list(params)
        if len(all_params) != len(listed):
            raise InvalidRequestError(f"{len(listed)} prompts, but {len(all_params)} sampling parameters")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        grammar = read_outputs(structured_outputs) if structured_outputs else None
        works = [
            self._work(prompt, one, stops, prune or self._prune, speculate, grammar)
            for prompt, one in zip(listed, all_params, strict=True)
        ]
        try:
            self._run({work.request.id: work for work in works}, progress)
        finally:
            for work in works:  # after an error or Ctrl-C the others must not linger
                self._loop.abort(work.request.id)
        return [work.completion for work in works]

    def _work(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        stops: tuple[str, ...],
        prune: PruneParams | None,
        speculate: bool,
        grammar: Grammar | None,
    ) -> "_Work":
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self._served += 1
        repeat_ids = () if prune is None else self.tokenizer.repeat_ids
        name = str(self._served)
        own: dict[str, Any] = {"repeat_ids": repeat_ids, "speculate": speculate, "grammar": grammar}
        request = Request.create(name, ids, params, self._seeds, prune=prune, **own)
        return _Work(request, self.tokenizer, stops)

    def _run(self, works: "dict[RequestId, _Work]", show: bool) -> None:
        for work in works.values():
            self._loop.submit(work.request)
        with Progress(*_COLUMNS, console=Console(stderr=True), disable=not show) as bar:
            task = bar.add_task("generating", total=len(works), rate=0.0)
            started, tokens, missing = time.perf_counter(), 0, len(works)
            while missing:
                for event in single_events(self._loop.step().events):
                    if isinstance(event, Failed):
                        raise revive(event.error)
                    tokens += len(event.token_ids) if isinstance(event, Tokens) else 0
                    if works[event.request_id].take(event):
                        missing -= 1
                        self._loop.abort(event.request_id)  # a stop string ends what the engine would go on with
                        bar.advance(task)
                bar.update(task, rate=tokens / (time.perf_counter() - started))


def _listed(prompts: str | Sequence[int] | Sequence[str | Sequence[int]]) -> Sequence[str | Sequence[int]]:
    """One text is one prompt and no list of letters; one list of token ids is one prompt, too."""
    if isinstance(prompts, str):
        return [prompts]
    ids = [prompt for prompt in prompts if isinstance(prompt, int)]
    if ids and len(ids) == len(prompts):
        return [ids]
    listed = [prompt for prompt in prompts if not isinstance(prompt, int)]
    if len(listed) < len(prompts):
        raise InvalidRequestError("prompts are texts or lists of token ids, or one of these; some are single numbers")
    return listed


class _Work:
    """A request under way and what it has given so far."""

    def __init__(self, request: Request, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        self.request = request
        self.completion = Completion(list(request.prompt_ids), [Choice() for _ in range(request.params.n)])
        self._done = False
        self._output = RequestOutput(Job(request, first_index=0, stops=stops), tokenizer)

    def take(self, event: Event) -> bool:
        """Take in an event; True when it completes the request."""
        if self._done:
            return False
        if isinstance(event, Tokens) and event.index == 0:
            self.completion.prompt_logprobs += event.prompt_logprobs or []
        for delta in self._output.push(event):
            choice = self.completion.choices[delta.index]
            choice.text += delta.text
            choice.cache = delta.cache or choice.cache
            choice.finish_reason = delta.finish_reason or choice.finish_reason
            if isinstance(event, Tokens):
                choice.token_ids += event.token_ids[: delta.num_tokens]
                choice.logprobs += (event.logprobs or [])[: delta.num_tokens]
        self._done = self._output.done
        return self._done
