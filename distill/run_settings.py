"""What one distillation is asked to do, and the folder that remembers it."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ..core.errors import ConfigError
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
    device: str = "cpu"
    trust_remote_code: bool = False


def _check(holds: bool, name: str, wanted: str, got: object) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {wanted}, got {got}", param=name)


def claim_folder(settings: Settings) -> None:
    """Make the folder, or find the same run in it. Raises `ConfigError` if another one is there."""
    path = settings.out / "settings.json"
    free = {"device", "save_minutes"}
    mine = {
        name: value
        for name, value in json.loads(msgspec.json.encode(settings, enc_hook=str)).items()
        if name not in free
    }
    try:
        if path.exists():
            if json.loads(path.read_text(encoding="utf-8")) != mine:
                raise ConfigError(f"{settings.out} holds a run of other settings; choose another --out", param="out")
            return
        settings.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(mine, indent=2) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot use {settings.out}: {error}", param="out") from error
