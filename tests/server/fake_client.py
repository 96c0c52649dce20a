"""A scripted engine client: each test says which events a request gets."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

import msgspec

from quire.core.errors import QuireError
from quire.core.messages import EngineInfo, EngineStats, Event, Finished, FinishReason, Logprob, Tokens
from quire.core.model_spec import ModelSpec
from quire.core.request import Request
from quire.core.speculation import DraftInfo
from quire.scheduler.client import Status

Step = Event | QuireError | Exception | asyncio.Event
"""What happens next: an event, a failure, or a wait."""
Script = Callable[[Request], Iterable[Step]]


def engine_info(max_model_len: int = 256) -> EngineInfo:
    """Facts of a small imaginary model."""
    spec = ModelSpec(
        name="/models/tiny",
        architecture="LlamaForCausalLM",
        num_layers=1,
        num_kv_heads=1,
        num_heads=1,
        head_dim=8,
        vocab_size=1000,
        max_context=max_model_len,
        windows=(None,),
        eos_token_ids=(0,),
    )
    return EngineInfo(
        model=spec,
        runner="native",
        device="cpu",
        dtype="float32",
        max_model_len=max_model_len,
        page_size=16,
        num_pages=100,
        kv_bytes=1 << 20,
        max_concurrency=4.0,
    )


def fake_logprob(token_id: int, top: int) -> Logprob:
    """Deterministic log-probabilities: the token itself is the most likely one."""
    return Logprob(token_id, -token_id / 100, [(token_id + rank, -(token_id + rank) / 100) for rank in range(top)])


def says(*outputs: Sequence[int], per_event: int = 1, reason: FinishReason = "stop") -> Script:
    """A script in which choice i gets the tokens `outputs[i % len]`, interleaved, with the logprobs asked for."""

    def script(request: Request) -> Iterable[Step]:
        params = request.params
        if params.prompt_logprobs is not None:
            scores = [fake_logprob(token, params.prompt_logprobs) for token in request.prompt_ids[1:]]
            for half in (scores[: len(scores) // 2], scores[len(scores) // 2 :]):
                for index in range(params.n):
                    yield Tokens(request.id, index, [], prompt_logprobs=half)
        longest = max(len(output) for output in outputs)
        for start in range(0, longest, per_event):
            for index in range(params.n):
                ids = list(outputs[index % len(outputs)][start : start + per_event])
                if ids:
                    scored = None if params.logprobs is None else [fake_logprob(t, params.logprobs) for t in ids]
                    yield Tokens(request.id, index, ids, scored)
        for index in range(params.n):
            yield Finished(request.id, index, reason, queue_seconds=0.25)

    return script


class FakeClient:
    """Fulfils `EngineClient`; remembers what it was asked and what was closed early."""

    def __init__(self) -> None:
        self.status: Status = "ready"
        self.info: EngineInfo | None = engine_info()
        self.stats = EngineStats()
        self.heartbeat_age = 0.5
        self.restarts = 0
        self.script: Script = says([])
        self.requests: list[Request] = []
        self.closed_early: list[str] = []
        self.listeners: list[Callable[[EngineStats], None]] = []
        self.drafts: dict[str, DraftInfo | QuireError] = {}
        """What comes of replacing the draft, by folder."""

    def add_stats_listener(self, callback: Callable[[EngineStats], None]) -> None:
        """See `EngineClient`."""
        self.listeners.append(callback)

    async def replace_draft(self, folder: str) -> DraftInfo:
        """See `EngineClient`."""
        result = self.drafts[folder]
        if isinstance(result, QuireError):
            raise result
        assert self.info is not None
        self.info = msgspec.structs.replace(self.info, draft=result)
        return result

    async def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        """Play the script."""
        self.requests.append(request)
        open_choices = request.params.n
        try:
            for step in self.script(request):
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, Exception):
                    open_choices = 0
                    raise step
                else:
                    await asyncio.sleep(0)
                    open_choices -= isinstance(step, Finished)
                    yield step
        finally:
            if open_choices:
                self.closed_early.append(request.id)
