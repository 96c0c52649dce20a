"""What scheduler, engine and server say to each other about speculative decoding."""

import re
from pathlib import Path
from typing import Literal

import msgspec

from .errors import ConfigError

DraftMethod = Literal["model", "ngram", "layerskip"]
DRAFT_METHODS: tuple[DraftMethod, ...] = ("model", "ngram", "layerskip")
MAX_DRAFT_TOKENS = 16
"""Most tokens of one proposal."""
_LAYER_SKIP = "layerskip:"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check_draft(draft: str) -> None:
    """Raises `ConfigError` for what cannot be a drafter (`EngineConfig.draft`), before anything is loaded."""
    if draft in ("auto", "none", "ngram") or draft_layers(draft) is not None:
        return
    folder = Path(draft)
    if draft and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"draft: there is no config.json in {draft}", param="draft")
    elif not _HUB_NAME.fullmatch(draft):
        raise ConfigError(
            f"draft must be auto, ngram, layerskip:N, none, a checkpoint's folder or its hub name (owner/name), "
            f"got {draft!r}",
            param="draft",
        )


def draft_layers(draft: str) -> int | None:
    """N of `layerskip:N`: how many of the model's first layers draft; None for another drafter.

    Raises `ConfigError` if N is no positive number; that the model has more layers is for its loader to see.
    """
    if not draft.startswith(_LAYER_SKIP):
        return None
    layers = draft.removeprefix(_LAYER_SKIP)
    if not (layers.isascii() and layers.isdigit() and int(layers) > 0):
        raise ConfigError(f"draft layerskip:N needs a number of layers from 1 on, got {draft!r}", param="draft")
    return int(layers)


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


class StepCosts(msgspec.Struct, frozen=True, kw_only=True):
    """What steps cost on this machine, measured when the engine warms up; each point is (count, seconds), ascending."""

    rows: list[tuple[int, float]] = []
    """Rows of the target's forward pass, sampling included."""
    drafts: list[tuple[int, float]] = []
    """Sequences that draft together -> seconds per drafted token of depth, e.g. one pass of the draft model."""


class DraftInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The drafter that the engine settled on."""

    method: DraftMethod
    name: str
    """For people: the draft's folder, `ngram`, `layerskip:2`."""
    most: int
    """Most tokens of one proposal, 1 to `MAX_DRAFT_TOKENS`."""
    fixed: bool = False
    """The operator wants `most` tokens, always; else the scheduler chooses the length, 0 included."""
    num_bytes: int = 0
    """Of the draft's weights and cache."""
    costs: StepCosts = StepCosts()


class SpeculationCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Totals since the engine started, as vLLM counts them; a draft is one sequence's proposal in one step."""

    drafts: int = 0
    """Proposals of at least one token."""
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_position: list[int] = []
    """Accepted tokens by their place in the proposal."""
    lengths: list[int] = []
    """How often each length was asked for: by 0, 1, ... tokens, of sequences that decode and may speculate."""
    draft_seconds: float = 0.0
    """Time that proposing took."""
    step_seconds: float = 0.0
    """Time of all steps, proposing included."""
