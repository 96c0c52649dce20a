"""What one distillation is asked to do, and the folder that remembers it."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import msgspec

from ..core.errors import ConfigError
from ..core.speculation import MAX_DRAFT_TOKENS
from .divergences import Divergence
from .draft_init import Init
from .draft_trainer import Schedule
from .rounds import Mixture
from .stored import lock, reading

SHORTEST_ROW = 16
"""Tokens."""
ELSEWHERE = ("out", "device", "save_minutes")
"""Settings that change nothing about the weights: a run may go on with others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One distillation."""

    target: str
    """Checkpoint folder."""
    out: Path
    init: Init
    schedule: Schedule
    data: tuple[Path, ...] = ()
    """Files of prompts; none: texts that the target begins by itself."""
    held_out: tuple[Path, ...] = ()
    """Files of prompts to measure on; none: some of the others."""
    divergence: Divergence = "kl"
    mixture: Mixture = field(default_factory=Mixture)
    temperatures: tuple[float, ...] = (1.0, 0.0)
    """Of continuations."""
    temperature: float = 1.0
    """Of the distributions compared."""
    length: int = 512
    """Most tokens of a row."""
    kept: int = 64
    """Tokens of each of the target's distributions that are stored."""
    held_texts: int = 96
    held_tokens: int = 128
    draft_tokens: int = 4
    """Most tokens of a proposal, in the measurements."""
    save_minutes: float = 5.0
    seed: int = 0
    device: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Raises `ConfigError` for what cannot be."""
        schedule, shares = self.schedule, (self.mixture.fixed, self.mixture.target, self.mixture.draft)
        for name in ("steps", "batch_rows", "micro_rows", "round_rows"):
            _check(getattr(schedule, name) >= 1, name, "at least 1", getattr(schedule, name))
        for name, number in (("temperature", self.temperature), ("rate", schedule.rate), ("passes", schedule.passes)):
            _check(0 < number < math.inf, name, "a positive number", number)
        _check(0 <= self.seed < 2**32, "seed", "from 0 to 4294967295", self.seed)
        _check(self.kept >= 1, "kept", "at least 1", self.kept)
        _check(self.length >= SHORTEST_ROW, "length", f"at least {SHORTEST_ROW}", self.length)
        drafts = f"from 1 to {MAX_DRAFT_TOKENS}"
        _check(1 <= self.draft_tokens <= MAX_DRAFT_TOKENS, "draft_tokens", drafts, self.draft_tokens)
        hot = all(0 <= temperature <= 100 for temperature in self.temperatures)
        _check(bool(self.temperatures) and hot, "temperatures", "numbers from 0 to 100", self.temperatures)
        mixes = all(0 <= share < math.inf for share in shares) and sum(shares) > 0
        _check(mixes, "mix", "shares of 0 or more, not all of them 0", shares)


def _check(holds: bool, name: str, wanted: str, got: object) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {wanted}, got {got}", param=name)


def claim_folder(settings: Settings) -> IO[str]:
    """Make the folder, or find the same run in it; it is this run's until the file returned is closed.

    Raises `ConfigError` if another run has begun there, or is at work there.
    """
    path, begun = settings.out / "settings.json", (settings.out / "state.pt").exists()
    described = json.loads(msgspec.json.encode(settings, enc_hook=str))
    mine = {name: value for name, value in described.items() if name not in ELSEWHERE}
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        claim = lock(settings.out)
        if begun:
            _compare(path, mine, settings.out)
        else:  # what a run left that never made a step is not this one's
            (settings.out / "held_out.json").unlink(missing_ok=True)
        path.write_text(json.dumps(mine, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot use {settings.out}: {error}", param="out") from error
    return claim


def _compare(path: Path, mine: dict[str, object], out: Path) -> None:
    """Raises `ConfigError`, naming them, if the settings stored at `path` are others."""
    with reading(path):
        stored = json.loads(path.read_text(encoding="utf-8"))
        others = [name for name in mine if name in stored and stored[name] != mine[name]]
    if others or stored.keys() - set(ELSEWHERE) != mine.keys():
        what = f" ({', '.join(others)})" if others else ""
        raise ConfigError(f"{out} holds a run of other settings{what}; choose another --out", param="out")
