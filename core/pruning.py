"""What a request or the operator asks of pruning: `PruneParams`; and what the engine offers: `PolicyInfo`."""

import math
from typing import Literal

import msgspec

from .errors import InvalidRequestError

Budget = Literal["uniform", "pyramid", "prefix", "ada", "global", "threshold"]
Refinement = Literal["value-norm", "chunk"]
Positions = Literal["text", "cache"]
MAX_WINDOW = 4096


class PruneParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a sequence forgets. Entries are counted per head; raises `InvalidRequestError` for what is out of range.

    Whether the policy exists is the engine's to say (`EngineInfo.policies`).
    """

    policy: str
    """A name in the engine's table of policies."""
    keep: float = 0.5
    """Share of the entries that stays, (0, 1]; 1 prunes nothing."""
    floor: int = 256
    """No head is pruned below this many entries on average."""
    window: int = 64
    """The newest entries, always kept; also how many queries a policy that looks at queries observes."""
    sinks: int = 4
    """The first entries, always kept (StreamingLLM, Xiao et al. 2023)."""
    budget: Budget = "uniform"
    """How the total is divided among layers and heads."""
    threshold: float | None = None
    """With budget `threshold`: what scores below it is dropped, whatever the share."""
    refine: tuple[Refinement, ...] = ()
    """Wrappers of the scores: by the norm of the projected values (CriticalKV), by whole chunks (ChunkKV)."""
    chunked: bool = True
    """Also after each chunk of the prompt, so that the peak falls; else only from the end of the prompt on."""
    context: int = 0
    """Leading prompt tokens that are pruned before what follows is read, so that no question at the prompt's end has a
    say in what stays of a document; 0, or more than there are: the whole prompt."""
    every: int = 64
    """Generated tokens after which to prune again; 0: never while decoding."""
    when: Literal["always", "pressure"] = "always"
    """pressure: only where otherwise somebody would be preempted."""
    positions: Positions = "text"
    """Where entries are rotated to: their places in the text, or those among the entries kept (StreamingLLM), so that a
    text may outgrow the model's context; `cache` goes with policies that say so only (`PolicyInfo.closes_up`)."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("floor", 1, None),
            ("window", 1, MAX_WINDOW),
            ("sinks", 0, MAX_WINDOW),
            ("context", 0, None),
        ):
            value = getattr(self, name)
            if value < low or (high is not None and value > high):
                span = f"at least {low}" if high is None else f"from {low} to {high}"
                raise InvalidRequestError(f"prune.{name} must be {span}, got {value}", param=f"prune.{name}")
        if not (math.isfinite(self.keep) and 0 < self.keep <= 1):
            raise InvalidRequestError(f"prune.keep must be > 0 and <= 1, got {self.keep}", param="prune.keep")
        if self.every < 0:
            raise InvalidRequestError(f"prune.every must be at least 0, got {self.every}", param="prune.every")
        if (self.budget == "threshold") != (self.threshold is not None):
            raise InvalidRequestError(
                "prune.threshold goes with the budget 'threshold', and only with it", param="prune.threshold"
            )
        if self.positions == "cache" and (self.budget != "uniform" or self.refine or not self.every):
            raise InvalidRequestError(
                "prune.positions 'cache' needs the budget 'uniform', no refinement and prune.every above 0",
                param="prune.positions",
            )

    @property
    def forgets(self) -> bool:
        """Whether anything can ever be pruned."""
        return self.keep < 1 or self.budget == "threshold"

    @property
    def least_share(self) -> float:
        """Share of all entries that surely stays, however often it is pruned: each time `keep` counts all that came."""
        return 0.0 if self.budget == "threshold" else self.keep

    def target(self, entries: int) -> int:
        """Entries per head, on average, that stay of `entries`: the one definition of the count kept.

        Never fewer than sinks and window together, which are always kept.
        """
        wanted = max(self.floor, math.floor(self.keep * entries), self.sinks + self.window)
        return min(entries, wanted)


class PolicyInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What scheduler and server must know of a policy."""

    selects: bool = False
    """It forgets nothing: each step reads only the pages that it selects."""
    repeats: bool = False
    """It scores entries by a second pass in which the model repeats its context (KVzip)."""
    observes: Literal["", "newest", "all"] = ""
    """Which queries it must have seen, so that no prefix may be reused that covers them: its window's, or all."""
    closes_up: bool = False
    """All heads keep the same entries, which the engine can rotate to places without gaps (`PruneParams.positions`)."""
    obstacle: str | None = None
    """Why the served model cannot be pruned this way; None: it can."""

    @property
    def relieves(self) -> bool:
        """Whether it can prune at any time, so that pages come free where they are short."""
        return not (self.selects or self.repeats)


class PruneCounts(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one policy did since the engine started."""

    entries: int = 0
    """Entries dropped, of all heads."""
    pages: int = 0
    """Pages that this made available."""
    seconds: float = 0.0
    """Time to choose what to keep."""
    prunes: dict[str, int] = {}
    """How often, by reason: prompt, decode or pressure."""


class CacheUse(msgspec.Struct, frozen=True, array_like=True):
    """What a sequence that prunes holds of its tokens, per head of a layer without a window."""

    kept: float
    dropped: float
