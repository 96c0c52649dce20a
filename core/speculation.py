"""What scheduler, engine and server say to each other about speculative decoding."""

from dataclasses import dataclass
from typing import Literal

import msgspec

from .errors import ConfigError

DraftMethod = Literal["model", "ngram", "hybrid", "layerskip"]
MAX_DRAFT_TOKENS = 16
"""Most tokens of one proposal."""


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
    """For people: the draft's folder, `ngram`, `ngram+` a folder, `layerskip:2`."""
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
    """Tokens of proposals, those of a tree on whichever branch."""
    accepted_tokens: int = 0
    accepted_per_position: list[int] = []
    """Accepted tokens by their place in the proposal: in a tree, how deep it is."""
    lengths: list[int] = []
    """How often each length was asked for: by 0, 1, ... tokens, of sequences that decode and may speculate."""
    draft_seconds: float = 0.0
    """Time that proposing took."""
    step_seconds: float = 0.0
    """Time of all steps, proposing included."""
    cached_tokens: int = 0
    """Known tokens that a draft model found in its cache when it was to draft for a sequence, see `CaughtUp`."""
    computed_tokens: int = 0
    """Known tokens that it computed."""


@dataclass(frozen=True, slots=True)
class CaughtUp:
    """Known tokens that a draft model took in during a step."""

    cached: int = 0
    """Found in its cache, where other sequences had left them, or the same one before it was preempted."""
    computed: int = 0


class DraftChoice(msgspec.Struct, frozen=True):
    """What the operator's setting `draft` means."""

    method: Literal["none", "auto"] | DraftMethod
    layers: int = 0
    """With layerskip: the target's first layers that draft."""
    model: str = ""
    """With model and hybrid: folder or hub name."""

    @property
    def name(self) -> str:
        """For people; see `DraftInfo.name`."""
        if self.model:
            return f"{_WITH_NGRAMS}{self.model}" if self.method == "hybrid" else self.model
        return f"{self.method}:{self.layers}" if self.layers else self.method


_WITH_NGRAMS = "ngram+"
_PLAIN = {"none": DraftChoice("none"), "auto": DraftChoice("auto"), "ngram": DraftChoice("ngram")}


def parse_draft(text: str) -> DraftChoice:
    """`none`, `auto`, `ngram`, `layerskip:N`, the folder or hub name of a draft model, or `ngram+` that for both.

    Raises `ConfigError` on what is none of these. Whether a model is there, and whether the target has more than N
    layers, is found out when they are loaded.
    """
    if text in _PLAIN:
        return _PLAIN[text]
    method, _, layers = text.partition(":")
    if method == "layerskip":
        if not (layers.isascii() and layers.isdigit() and int(layers) >= 1):
            raise ConfigError(f"draft must be layerskip:N with N at least 1, got {text!r}", param="draft")
        return DraftChoice("layerskip", layers=int(layers))
    model = text.removeprefix(_WITH_NGRAMS)
    if not model.strip():
        raise ConfigError(
            f"draft must be none, auto, ngram, layerskip:N, a draft model or ngram+ one, got {text!r}", param="draft"
        )
    return DraftChoice("model" if model == text else "hybrid", model=model)
