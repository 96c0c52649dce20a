"""Around every route: the API key, the body limit, HTTP metrics, and the last resort for unexpected errors."""

from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..core.errors import (
    AuthenticationError,
    EngineUnavailableError,
    PermissionDeniedError,
    QuireError,
    RequestTooLargeError,
)
from .errors import error_response, unexpected
from .keys import find_key
from .settings import ServerSettings, Service

OPEN_PATHS = frozenset({"/health", "/ready"})
"""Probes come without a key."""
ADMIN_PATHS = frozenset({"/draft"})
"""What changes the server for everybody: where there is an admin key, it alone opens them."""
DRAIN_RETRY_SECONDS = 10.0
"""By then another instance, or the next one, answers."""
CLIENT_CLOSED_REQUEST = 499
"""Nginx's status for a client that went away; only metrics see it."""


class Gate:
    """Pure ASGI middleware; everything that reaches a route has passed here."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        metrics = self._service.metrics
        self._service.open_requests += 1
        try:
            headers = Headers(scope=scope)
            tenant = _authorize(scope["path"], headers, self._service.settings)
            scope.setdefault("state", {})["tenant"] = tenant
            if self._service.draining and scope["method"] == "POST":
                raise EngineUnavailableError("the server is shutting down", retry_after=DRAIN_RETRY_SECONDS)
            await self._app(scope, _limited(headers, receive, self._service.settings.max_body_bytes), noting)
        except ClientDisconnect:
            status = CLIENT_CLOSED_REQUEST
        except Exception as error:
            failure = error if isinstance(error, QuireError) else unexpected(error)
            metrics.failed(failure)
            if status == 0:  # else the head is out: the server cuts the connection
                await error_response(failure)(scope, receive, noting)
        finally:
            self._service.open_requests -= 1
            metrics.answered(_route_of(scope), status or HTTPStatus.INTERNAL_SERVER_ERROR)


def _authorize(path: str, headers: Headers, settings: ServerSettings) -> str:
    """Whose key the request came with; empty where none is needed."""
    keys = settings.api_keys
    guarded = path in ADMIN_PATHS and any(key.admin for key in keys)
    if path in OPEN_PATHS or not (guarded or any(not key.admin for key in keys)):
        return ""
    scheme, _, offered = headers.get("authorization", "").partition(" ")
    key = find_key(offered.strip().encode("latin-1"), keys)  # headers are raw bytes as Latin-1
    if scheme.lower() != "bearer" or key is None:
        raise AuthenticationError("a valid API key is needed: Authorization: Bearer KEY")
    if guarded and not key.admin:
        raise PermissionDeniedError(f"{path} needs an admin key of this server")
    return key.tenant


def _limited(headers: Headers, receive: Receive, limit: int) -> Receive:
    """Refuse a body over `limit` bytes: at once if its length is announced, else when it goes over."""
    error = RequestTooLargeError(f"the request body is larger than {limit:,} bytes")
    announced = headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise error
    size = 0

    async def counting() -> Message:
        nonlocal size
        message = await receive()
        if message["type"] == "http.request":
            size += len(message.get("body", b""))
            if size > limit:
                raise error
        return message

    return counting


def _route_of(scope: Scope) -> str:
    return str(getattr(scope.get("route"), "path", "unmatched"))
