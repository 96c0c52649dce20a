"""The OpenAI API: models, completions, chat completions."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ..core.errors import InvalidRequestError
from ..core.speculation import DraftInfo
from .docs import body_schema
from .generation import Delta, Job, stream_deltas
from .prompts import chat_jobs, completion_jobs
from .responses import ChatFormat, CompletionFormat, Heading, ResponseFormat, Usage, WholeChoice
from .schemas import ChatBody, CompletionBody, GenerationBody, StreamOptions, parse_body
from .settings import Service
from .streaming import EventStreamResponse, event_stream, first_of, until_disconnect

router = APIRouter(prefix="/v1")


def json_response(body: Any, status: int = 200) -> Response:
    """A body as JSON."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")


@dataclass(frozen=True, slots=True)
class _Answer:
    """A request that is understood and tokenized, about to be generated."""

    service: Service
    jobs: Sequence[Job]
    style: ResponseFormat
    arrived: float
    """On `time.perf_counter`."""

    @property
    def num_choices(self) -> int:
        return sum(job.request.params.n for job in self.jobs)

    @property
    def usage(self) -> Usage:
        prune = self.jobs[0].request.prune
        return Usage(
            sum(len(job.request.prompt_ids) for job in self.jobs), policy=None if prune is None else prune.policy
        )

    def deltas(self) -> AsyncGenerator[list[Delta], None]:
        return stream_deltas(self.service, self.jobs, self.arrived)


@router.post("/completions", openapi_extra=body_schema(CompletionBody))
async def completions(request: Request) -> Response:
    """Continue one prompt or several."""
    arrived = time.perf_counter()
    service: Service = request.app.state.service
    body = parse_body(CompletionBody, await request.body())
    heading = _heading(service, body, "cmpl", logprobs=body.logprobs is not None)
    jobs = await completion_jobs(service, body, heading.id, request.state.tenant)
    return await _respond(request, body, _Answer(service, jobs, CompletionFormat(heading, service.tokenizer), arrived))


@router.post("/chat/completions", openapi_extra=body_schema(ChatBody))
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    arrived = time.perf_counter()
    service: Service = request.app.state.service
    body = parse_body(ChatBody, await request.body())
    heading = _heading(service, body, "chatcmpl", logprobs=bool(body.logprobs))
    jobs = await chat_jobs(service, body, heading.id, request.state.tenant)
    return await _respond(request, body, _Answer(service, jobs, ChatFormat(heading, service.tokenizer), arrived))


@router.get("/models")
async def models(request: Request) -> Response:
    """The names under which the model is served."""
    service: Service = request.app.state.service
    return json_response(
        {"object": "list", "data": [_model_card(service, name) for name in service.settings.served_model_names]}
    )


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """One of them."""
    service: Service = request.app.state.service
    return json_response(_model_card(service, service.served_name(name)))


def _model_card(service: Service, name: str) -> dict[str, Any]:
    info = service.client.info
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "quire",
        "root": info.model.name if info else None,
        "parent": None,
        "max_model_len": service.max_model_len,
        "draft": draft_card(info.draft) if info and info.draft else None,
        "prune_policies": [name for name, policy in info.policies.items() if not policy.obstacle] if info else [],
    }


def draft_card(draft: DraftInfo) -> dict[str, Any]:
    """Who drafts."""
    return {
        "method": draft.method,
        "name": draft.name,
        "max_tokens": draft.most,
        "fixed": draft.fixed,
        "bytes": draft.num_bytes,
    }


def _heading(service: Service, body: GenerationBody, kind: str, logprobs: bool) -> Heading:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("stream_options needs stream to be true", param="stream_options")
    name = service.served_name(body.model)
    return Heading(id=f"{kind}-{uuid.uuid4().hex}", model=name, created=int(time.time()), logprobs=logprobs)


async def _respond(request: Request, body: GenerationBody, answer: _Answer) -> Response:
    if not body.stream:
        return json_response(await until_disconnect(request.receive, _whole(answer)))
    events = event_stream(
        answer.deltas(),
        answer.style,
        answer.usage,
        num_choices=answer.num_choices,
        options=body.stream_options or StreamOptions(),
        metrics=answer.service.metrics,
    )
    # The status is decided by the first event: a refusal by the engine is a real 4xx or 5xx here too.
    first = await until_disconnect(request.receive, first_of(events))
    return EventStreamResponse(first, events)


async def _whole(answer: _Answer) -> dict[str, Any]:
    choices = [WholeChoice(index) for index in range(answer.num_choices)]
    usage = answer.usage
    async with aclosing(answer.deltas()) as deltas:
        async for batch in deltas:
            for delta in batch:
                choices[delta.index].add(delta)
                usage.add(delta)
    return answer.style.whole(choices, usage)
