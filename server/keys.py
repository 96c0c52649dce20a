"""API keys: `NAME=KEY` or just `KEY`, whose a request is, and what it may do."""

import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from hashlib import blake2b

from ..core.errors import ConfigError

_NAMED = re.compile(r"([A-Za-z0-9_.-]{1,64})=(.*[^=].*)", re.DOTALL)
"""A key's own padding (`abc==`) names nobody."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key and the tenant whose it is."""

    tenant: str
    key: str
    admin: bool = False
    """Opens what the operator keeps to himself, too."""

    @staticmethod
    def parse(text: str) -> "ApiKey":
        """`NAME=KEY`, or a `KEY` whose tenant is a short hash of it. Raises `ConfigError` for an empty one."""
        if named := _NAMED.fullmatch(text):
            return ApiKey(named[1], named[2])
        if not text:
            raise ConfigError("an API key is empty", param="api_key")
        return ApiKey(short_hash(text), text)


def parse_keys(texts: Iterable[str], admin: Iterable[str] = ()) -> tuple[ApiKey, ...]:
    """All keys; several may be one tenant's. Raises `ConfigError` if one is given to two."""
    keys = tuple(ApiKey.parse(text) for text in texts)
    keys += tuple(replace(ApiKey.parse(text), admin=True) for text in admin)
    if len({key.key for key in keys}) < len(keys):
        raise ConfigError("the same API key is given twice", param="api_key")
    return keys


def find_key(offered: bytes, keys: Iterable[ApiKey]) -> ApiKey | None:
    """The key that was offered, if it is one. In constant time, so that a refusal's time tells nothing of the keys."""
    found: ApiKey | None = None
    for key in keys:
        if hmac.compare_digest(offered, key.key.encode()):
            found = key
    return found


def short_hash(text: str) -> str:
    """Twelve hexadecimal digits."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
