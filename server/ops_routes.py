"""What operators and tools ask for: health, readiness, version, metrics, tokenizing."""

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from ..core.errors import InvalidRequestError
from .docs import body_schema
from .openai_routes import draft_card, json_response
from .prompts import chat_ids
from .schemas import DetokenizeBody, DraftBody, TokenizeBody, parse_body
from .settings import Service

HEARTBEAT_LIMIT = 120.0
"""Seconds without a sign of life from the engine after which /health says 503; a step may take long."""

router = APIRouter()


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(request: Request) -> Response:
    """200 while the engine's heart beats, else 503 with the reason."""
    service: Service = request.app.state.service
    client = service.client
    if client.status != "ready":
        return json_response({"status": "unhealthy", "reason": f"the engine is {client.status}"}, 503)
    if client.heartbeat_age >= HEARTBEAT_LIMIT:
        reason = f"no sign of life from the engine for {client.heartbeat_age:.0f} s (limit {HEARTBEAT_LIMIT:.0f} s)"
        return json_response({"status": "unhealthy", "reason": reason}, 503)
    return json_response({"status": "ok"})


@router.head("/ready", include_in_schema=False)
@router.get("/ready")
async def ready(request: Request) -> Response:
    """200 while new requests are welcome, else 503 with the state."""
    service: Service = request.app.state.service
    state = "draining" if service.draining else service.client.status
    return json_response({"status": state}, 200 if state == "ready" else 503)


@router.get("/version")
async def get_version() -> Response:
    """The server's version."""
    return json_response({"version": version("quire")})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    service: Service = request.app.state.service
    return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.post("/tokenize", openapi_extra=body_schema(TokenizeBody))
async def tokenize(request: Request) -> Response:
    """Tokens of a prompt or of a conversation."""
    service: Service = request.app.state.service
    body = parse_body(TokenizeBody, await request.body())
    service.served_name(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("either prompt or messages is needed", param="prompt")
    if body.messages is not None:
        tokens = await chat_ids(service.tokenizer, body.messages, body, bool(body.add_special_tokens))
    else:
        assert body.prompt is not None
        tokens = await service.tokenizer.encode_async(body.prompt, body.add_special_tokens is not False)
    answer: dict[str, Any] = {"count": len(tokens), "max_model_len": service.max_model_len, "tokens": tokens}
    strings = [service.tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None
    return json_response(answer | {"token_strs": strings})


@router.post("/detokenize", openapi_extra=body_schema(DetokenizeBody))
async def detokenize(request: Request) -> Response:
    """Text of tokens, special ones included."""
    service: Service = request.app.state.service
    body = parse_body(DetokenizeBody, await request.body())
    service.served_name(body.model)
    limit = service.tokenizer.vocab_size
    if body.tokens and max(body.tokens) >= limit:
        raise InvalidRequestError(f"token ids go from 0 to {limit - 1:,}, got {max(body.tokens)}", param="tokens")
    text = await service.tokenizer.run(len(body.tokens), service.tokenizer.decode, body.tokens, False)
    return json_response({"prompt": text})


@router.post("/draft", openapi_extra=body_schema(DraftBody))
async def draft(request: Request) -> Response:
    """Let another draft model take the present one's place, join n-grams or leave them, while requests are served;
    answers when that is so."""
    service: Service = request.app.state.service
    body = parse_body(DraftBody, await request.body())
    service.served_name(body.model)
    return json_response(draft_card(await service.client.replace_draft(body.draft)))
