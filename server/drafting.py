"""From the options on drafts to the engine's settings; what cannot be is refused before anything is loaded."""

import re
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError
from ..core.speculation import MAX_DRAFT_TOKENS, parse_draft

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def draft_settings(draft: str, draft_tokens: str) -> dict[str, Any]:
    """`draft` and `draft_tokens` of `EngineConfig`; raises `ConfigError`.

    A single word is no hub name here (`owner/name` is), so that a mistyped `ngram` is not looked for on the hub.
    """
    model = parse_draft(draft).model
    if model and Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            raise ConfigError(f"the draft {model} has no config.json", param="draft")
    elif model and not _HUB_NAME.fullmatch(model):
        raise ConfigError(
            f"draft must be auto, ngram, layerskip:N, none, a folder, a hub name (owner/name) or ngram+ one of these, "
            f"got {draft!r}",
            param="draft",
        )
    return {"draft": draft, "draft_tokens": parse_draft_tokens(draft_tokens)}


def parse_draft_tokens(text: str) -> int | None:
    """Draft length of `auto` (None) or `5`; raises `ConfigError` on anything else. The range is `EngineConfig`'s."""
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(
            f"draft_tokens must be auto or 1 to {MAX_DRAFT_TOKENS}, got {text!r}", param="draft_tokens"
        ) from error
