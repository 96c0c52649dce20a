"""What one distillation is asked to do, and the folder that remembers it."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ..core.errors import ConfigError
from ..core.speculation import MAX_DRAFT_TOKENS
from .divergences import Divergence
from .draft_init import Init
from .draft_trainer import Schedule
from .rounds import Mixture

SHORTEST_ROW = 16
"""Tokens."""


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


def claim_folder(settings: Settings) -> None:
    """Make the folder, or find the same run in it. Raises `ConfigError` if another one has begun there."""
    path = settings.out / "settings.json"
    described = json.loads(msgspec.json.encode(settings, enc_hook=str))
    mine = {name: value for name, value in described.items() if name not in ("device", "save_minutes")}
    try:
        if path.exists() and json.loads(path.read_text(encoding="utf-8")) != mine:
            if (settings.out / "state.pt").exists():
                raise ConfigError(f"{settings.out} holds a run of other settings; choose another --out", param="out")
            (settings.out / "held_out.json").unlink(missing_ok=True)
        settings.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(mine, indent=2) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot use {settings.out}: {error}", param="out") from error
