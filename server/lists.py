"""Lists on the command line."""

from collections.abc import Callable
from typing import TypeVar

from ..core.errors import InvalidRequestError

Item = TypeVar("Item")


def items(text: str, kind: Callable[[str], Item], option: str) -> list[Item]:
    """The items of a list separated by commas. Raises `InvalidRequestError` naming the option."""
    try:
        return [kind(item.strip()) for item in text.split(",") if item.strip()]
    except ValueError as error:
        raise InvalidRequestError(f"{option} must be a list separated by commas, got {text!r}") from error
