"""The one table from `QuireError` kinds to HTTP statuses, and the OpenAI error body that every refusal wears."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ..core.errors import (
    AuthenticationError,
    ConfigError,
    ConflictError,
    ContextLengthError,
    EngineUnavailableError,
    GenerationError,
    InvalidRequestError,
    ModelLoadError,
    ModelNotFoundError,
    OverloadedError,
    PermissionDeniedError,
    QuireError,
    RequestTimeoutError,
    RequestTooLargeError,
)

logger = logging.getLogger(__name__)

MAX_MESSAGE_CHARS = 500
"""Longest validation message sent back; inputs are never echoed at length."""


@dataclass(frozen=True, slots=True)
class ErrorMapping:
    """How one kind of error looks over HTTP."""

    status: int
    type: str
    """OpenAI's `error.type`."""
    code: str | None
    """OpenAI's `error.code`."""
    retry_after: float | None = None
    """Seconds for the Retry-After header where the error itself names none; None: no header."""


ERROR_TABLE: dict[type[QuireError], ErrorMapping] = {
    InvalidRequestError: ErrorMapping(400, "invalid_request_error", None),
    ContextLengthError: ErrorMapping(400, "invalid_request_error", "context_length_exceeded"),
    AuthenticationError: ErrorMapping(401, "authentication_error", "invalid_api_key"),
    PermissionDeniedError: ErrorMapping(403, "permission_error", "admin_key_needed"),
    ModelNotFoundError: ErrorMapping(404, "invalid_request_error", "model_not_found"),
    ConflictError: ErrorMapping(409, "invalid_request_error", "conflict"),
    RequestTooLargeError: ErrorMapping(413, "invalid_request_error", "request_too_large"),
    OverloadedError: ErrorMapping(429, "rate_limit_error", "overloaded", retry_after=1.0),
    EngineUnavailableError: ErrorMapping(503, "server_error", "engine_unavailable", retry_after=5.0),
    RequestTimeoutError: ErrorMapping(504, "timeout_error", "request_timeout"),
    GenerationError: ErrorMapping(500, "server_error", "generation_failed"),
    ConfigError: ErrorMapping(500, "server_error", "bad_configuration"),
    ModelLoadError: ErrorMapping(500, "server_error", "model_load_failed"),
    QuireError: ErrorMapping(500, "server_error", "internal_error"),
}


def mapping_of(error: QuireError) -> ErrorMapping:
    """The table row of the error's class, or of its nearest base class."""
    for kind in type(error).__mro__:
        if kind in ERROR_TABLE:
            return ERROR_TABLE[kind]
    raise AssertionError("QuireError itself is in the table")


def error_body(error: QuireError) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`."""
    row = mapping_of(error)
    return {"error": {"message": error.message, "type": row.type, "param": error.param, "code": row.code}}


def error_response(error: QuireError) -> Response:
    """The whole HTTP answer to a refused or failed request."""
    row = mapping_of(error)
    headers: dict[str, str] = {}
    retry_after = row.retry_after if error.retry_after is None else error.retry_after
    if row.retry_after is not None and retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after)))
    if row.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return _json(error_body(error), row.status, headers)


def unexpected(error: BaseException) -> QuireError:
    """What the client hears of a fault of ours: logged with its traceback, never shown."""
    logger.error("unexpected error in a request", exc_info=error)
    return QuireError("internal server error")


def invalid_request(error: ValidationError | RequestValidationError) -> InvalidRequestError:
    """The first fault that pydantic found, as one short line and the path of the field."""
    errors = (
        error.errors()
        if isinstance(error, RequestValidationError)
        else error.errors(include_url=False, include_context=False, include_input=False)
    )
    first = errors[0]
    path = ".".join(str(part) for part in first["loc"])[:MAX_MESSAGE_CHARS]
    unknown = first["type"] == "extra_forbidden"
    message = "there is no such field" if unknown else str(first["msg"]).removeprefix("Value error, ")
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    line = f"{path}: {message}{more}" if path else f"{message}{more}"
    return InvalidRequestError(line.replace("\n", " ")[:MAX_MESSAGE_CHARS], param=path or None)


def install_handlers(app: FastAPI, on_failure: Callable[[QuireError], None]) -> None:
    """Make every error that a route raises end as the OpenAI body; `on_failure` hears of each `QuireError`."""

    async def on_quire_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, QuireError)
        on_failure(error)
        # 503 and 504 are what the operator's log has once, or a limit that was set: each one is in the metrics alone.
        if mapping_of(error).status == HTTPStatus.INTERNAL_SERVER_ERROR:
            logger.warning("request failed: %s: %s", type(error).__name__, error.message)
        return error_response(error)

    async def on_validation_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(invalid_request(error))

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
        return _json(body, error.status_code, dict(error.headers or {}))

    app.add_exception_handler(QuireError, on_quire_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(HTTPException, on_http_error)


def _json(body: dict[str, Any], status: int, headers: dict[str, str]) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")
