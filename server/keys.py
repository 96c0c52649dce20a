"""API keys: `NAME=KEY` or just `KEY`, and whose a request is."""

import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

from ..core.errors import ConfigError

_NAMED = re.compile(r"([A-Za-z0-9_.-]{1,64})=(.*[^=].*)", re.DOTALL)
"""A key's own padding (`abc==`) names nobody."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key and the tenant whose it is."""

    tenant: str
    key: str

    @staticmethod
    def parse(text: str) -> "ApiKey":
        """`NAME=KEY`, or a `KEY` whose tenant is a short hash of it. Raises `ConfigError` for an empty one."""
        if named := _NAMED.fullmatch(text):
            return ApiKey(named[1], named[2])
        if not text:
            raise ConfigError("an API key is empty", param="api_key")
        return ApiKey(short_hash(text), text)


def parse_keys(texts: Iterable[str]) -> tuple[ApiKey, ...]:
    """All keys; several may be one tenant's. Raises `ConfigError` if one is given to two."""
    keys = tuple(ApiKey.parse(text) for text in texts)
    if len({key.key for key in keys}) < len(keys):
        raise ConfigError("the same API key is given twice", param="api_key")
    return keys


def tenant_of(offered: bytes, keys: Iterable[ApiKey]) -> str | None:
    """Whose key was offered; None if nobody's. In constant time, so that a refusal's time tells nothing of the keys."""
    found: str | None = None
    for key in keys:
        if hmac.compare_digest(offered, key.key.encode()):
            found = key.tenant
    return found


def short_hash(text: str) -> str:
    """Twelve hexadecimal digits."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
