"""The one error tree. Whatever a user can cause ends as one of these; `server/errors.py` maps them to statuses.

Errors cross the process border as an `ErrorInfo` (see `core/messages.py`): `describe` and `revive` convert.
"""

import msgspec


class QuireError(Exception):
    """Base of everything Quire refuses or fails with; the message is one clear line for the user."""

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        """The request field at fault, if one is."""
        self.retry_after = retry_after
        """Seconds after which trying again makes sense, if known."""


class InvalidRequestError(QuireError):
    """The request itself is wrong: a value out of range, a wrong type, an empty prompt."""


class ContextLengthError(InvalidRequestError):
    """Prompt (plus requested output) does not fit the model's context or the KV pool."""


class ModelNotFoundError(QuireError):
    """The request names a model that is not served here."""


class AuthenticationError(QuireError):
    """The API key is missing or wrong."""


class PermissionDeniedError(QuireError):
    """The API key is valid, but not for this: the operator keeps it to holders of an admin key."""


class ConflictError(QuireError):
    """What is asked for cannot be done beside what is under way."""


class RequestTooLargeError(QuireError):
    """The request body is larger than the server accepts."""


class OverloadedError(QuireError):
    """The waiting queue is full; `retry_after` says when to come back."""


class EngineUnavailableError(QuireError):
    """The engine process is starting, restarting or gone; open requests fail with this when it dies."""


class RequestTimeoutError(QuireError):
    """The request did not start within the operator's queue timeout, or did not end within its own."""


class GenerationError(QuireError):
    """This one request could not be computed (for example non-finite logits)."""


class ConfigError(QuireError):
    """The operator's settings cannot work together or with this machine."""


class ModelLoadError(QuireError):
    """The model cannot be served: missing, broken, pickled, unknown or untested architecture."""


_KINDS: dict[str, type[QuireError]] = {
    kind.__name__: kind
    for kind in (
        QuireError,
        InvalidRequestError,
        ContextLengthError,
        ModelNotFoundError,
        AuthenticationError,
        PermissionDeniedError,
        ConflictError,
        RequestTooLargeError,
        OverloadedError,
        EngineUnavailableError,
        RequestTimeoutError,
        GenerationError,
        ConfigError,
        ModelLoadError,
    )
}


class ErrorInfo(msgspec.Struct, frozen=True):
    """An error as it crosses the process border."""

    kind: str
    message: str
    param: str | None = None
    retry_after: float | None = None
    """Seconds."""


def describe(error: QuireError) -> ErrorInfo:
    """The wire form of `error`."""
    return ErrorInfo(type(error).__name__, error.message, error.param, error.retry_after)


def revive(info: ErrorInfo) -> QuireError:
    """The exception that `info` describes; an unknown kind becomes the base class."""
    kind = _KINDS.get(info.kind, QuireError)
    return kind(info.message, param=info.param, retry_after=info.retry_after)
