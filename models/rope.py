"""Rotary position embeddings: frequencies of every common scaling kind, and angles per row of a ragged batch.

Sources: RoPE (Su et al. 2021), linear position interpolation (Chen et al. 2023), dynamic NTK scaling (bloc97 and
emozilla 2023), YaRN (Peng et al. 2023), LongRoPE (Ding et al. 2024), the smoothed scaling of Llama 3.1.

Two kinds, `dynamic` and `longrope`, depend on how long the sequence is. Recomputing them as a sequence grows would
leave the keys already in the cache rotated by other angles than its new queries. Here the frequencies are fixed when
a sequence is admitted, by the most tokens it can reach, and differ from row to row of a batch; a sequence that cannot
outgrow the trained length gets exactly the plain ones.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..core.errors import ModelLoadError
from ..kernels.rotary import Angles, rotate_reference

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
ROPE_KINDS: tuple[str, ...] = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
LENGTH_DEPENDENT = ("dynamic", "longrope")
_LEAST_TABLE, _MOST_TABLE = 1024, 2**17
"""Positions whose cosines and sines are kept; more would be memory better spent on the cache."""


@dataclass(frozen=True, slots=True)
class RopeSettings:
    """What a model's configuration says about its rotary embedding."""

    kind: RopeKind
    theta: float
    """Base of the frequencies."""
    dim: int
    """Leading entries of a head that are rotated; even."""
    trained_length: int
    """Positions before any stretching: `original_max_position_embeddings`, else `max_position_embeddings`."""
    max_length: int
    """`max_position_embeddings`."""
    scaling: Mapping[str, Any]
    """The kind's own numbers: factor, low_freq_factor, beta_fast, short_factor, ..."""


def rope_settings(config: Mapping[str, Any], head_dim: int) -> RopeSettings:
    """Settings from a configuration in either form: `rope_theta` + `rope_scaling`, or `rope_parameters`.

    Raises `ModelLoadError` for an unknown kind, for frequencies that differ between layer types, and for a missing
    or unusable number.
    """
    raw = dict(config.get("rope_parameters") or {}) | dict(config.get("rope_scaling") or {})
    if any(isinstance(value, Mapping) for value in raw.values()):
        raise ModelLoadError("rotary frequencies that differ between layer types are not known to the native runner")
    kind = str(raw.get("rope_type") or raw.get("type") or "default")
    if kind not in ROPE_KINDS:
        raise ModelLoadError(f"unknown rotary scaling kind {kind!r} in config.json")
    theta = raw.get("rope_theta") or config.get("rope_theta") or 10000.0
    partial = raw.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    max_length = int(config.get("max_position_embeddings") or 2048)
    original = config.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings")
    settings = RopeSettings(
        cast(RopeKind, kind),
        float(theta),
        int(head_dim * float(partial)),
        int(original or max_length),
        max_length,
        raw,
    )
    _check(settings)
    return settings


_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}


def _check(settings: RopeSettings) -> None:
    """Raise `ModelLoadError` where a number the kind needs is missing or cannot be right."""
    missing = [key for key in _REQUIRED.get(settings.kind, ()) if settings.scaling.get(key) is None]
    if missing:
        raise ModelLoadError(f"config.json: rotary scaling {settings.kind!r} lacks {missing[0]}")
    if settings.dim < 2 or settings.dim % 2:
        raise ModelLoadError(f"config.json: the rotated part of a head must be even, got {settings.dim}")
    for key in ("short_factor", "long_factor") if settings.kind == "longrope" else ():
        if len(settings.scaling[key]) != settings.dim // 2:
            raise ModelLoadError(f"config.json: rotary {key} must have {settings.dim // 2} entries")


class RotaryEmbedding:
    """Turns positions into cosines and sines; holds the frequencies [dim / 2] float32 of the model's kind."""

    def __init__(self, settings: RopeSettings, device: torch.device) -> None:
        self.settings = settings
        self._exponents = torch.arange(0, settings.dim, 2, device=device).float() / settings.dim
        plain = 1.0 / settings.theta**self._exponents
        self._long = plain
        self.attention_factor = 1.0
        """Multiplies cosines and sines (YaRN and LongRoPE sharpen attention by it)."""
        factor = float(settings.scaling.get("factor") or 1.0)
        if settings.kind == "linear":
            plain = plain / factor
        elif settings.kind == "llama3":
            plain = _llama3(plain, settings)
        elif settings.kind == "yarn":
            plain, self.attention_factor = _yarn(plain, settings)
        elif settings.kind == "longrope":
            plain, self._long, self.attention_factor = _longrope(plain, settings)
        self._frequencies = plain
        self._table: tuple[Tensor, Tensor] | None = None
        """Cosines and sines of the first positions, [rows, dim / 2] each; grown when a position asks for it."""

    def frequencies(self, lengths: Tensor) -> Tensor:
        """Angle per position and pair: [dim / 2] float32, or [T, dim / 2] where the kind depends on `lengths` [T]."""
        settings = self.settings
        if settings.kind == "longrope":
            return torch.where((lengths > settings.trained_length)[:, None], self._long, self._frequencies)
        if settings.kind != "dynamic":
            return self._frequencies
        factor = float(settings.scaling["factor"])
        stretch = factor * lengths.clamp(min=settings.max_length).double() / settings.max_length - (factor - 1)
        bases = (settings.theta * stretch ** (settings.dim / (settings.dim - 2))).float()
        return 1.0 / bases[:, None] ** self._exponents

    def __call__(self, positions: Tensor, lengths: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, dim / 2] in `dtype` of `positions` [T]; the angles are computed in float32.

        `lengths` [T]: the most tokens each row's sequence can reach.
        """
        return self.angles(positions, lengths, dtype).picked()

    def angles(self, positions: Tensor, lengths: Tensor, dtype: torch.dtype) -> Angles:
        """The same, as yet to be picked from a table where there is one."""
        return self.table(positions, 0, dtype) or Angles(*self._compute(positions, self.frequencies(lengths), dtype))

    def table(self, positions: Tensor, ahead: int, dtype: torch.dtype) -> Angles | None:
        """Of `positions` [T], picked from all positions from 0 on, with `ahead` more behind the last of them.

        None where there is no such table.
        """
        # On a CPU a table costs two look-ups a step where computing costs ten operations; a GPU would have to be asked
        # for the largest position.
        if positions.device.type != "cpu" or not len(positions):
            return None
        needed = int(positions.numpy().max()) + 1 + ahead
        return Angles(*self.first(needed, dtype), positions) if self.has_table(needed) else None

    def has_table(self, count: int) -> bool:
        """Whether the angles of the first `count` positions are the same for all sequences, and few enough to keep."""
        return self.settings.kind not in LENGTH_DEPENDENT and count <= _MOST_TABLE

    def first(self, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the first `count` positions or more, [rows, dim / 2] each, where `has_table` says so."""
        if self._table is None or self._table[0].dtype != dtype or len(self._table[0]) < count:
            rows = max(_LEAST_TABLE, 1 << (count - 1).bit_length())
            self._table = self._compute(torch.arange(rows), self._frequencies, dtype)
        return self._table

    def turned(self, heads: Tensor, steps: Tensor, length: int) -> Tensor:
        """`heads` [T, N, D], rotated already, as if they stood `steps` [T] positions later; computed in float32.

        length: the most tokens that their sequence can reach. A new tensor in their dtype; where steps are 0, the same.
        """
        angles = steps.float()[:, None] * self.frequencies(torch.full_like(steps, length))
        return rotate_reference(heads.float(), angles.cos(), angles.sin()).to(heads.dtype)

    def _compute(self, positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = positions.float()[:, None] * frequencies
        return (angles.cos() * self.attention_factor).to(dtype), (angles.sin() * self.attention_factor).to(dtype)


def _llama3(plain: Tensor, settings: RopeSettings) -> Tensor:
    """Divide slow frequencies by the factor, keep fast ones, and blend between the two bounds."""
    factor, low, high = (float(settings.scaling[key]) for key in _REQUIRED["llama3"])
    turns = settings.trained_length * plain / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * plain / factor + blend * plain


def _yarn(plain: Tensor, settings: RopeSettings) -> tuple[Tensor, float]:
    """YaRN's frequencies and attention factor."""
    scaling, dim = settings.scaling, settings.dim
    factor = float(scaling.get("factor") or settings.max_length / settings.trained_length)

    def pair_of(turns: float) -> float:
        """Which pair makes this many turns over the trained length."""
        return dim * math.log(settings.trained_length / (turns * 2 * math.pi)) / (2 * math.log(settings.theta))

    low, high = pair_of(scaling.get("beta_fast") or 32), pair_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    pairs = torch.arange(dim // 2, dtype=torch.float32, device=plain.device)
    stretched = ((pairs - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return plain / factor * stretched + plain * (1 - stretched), _yarn_attention_factor(scaling, factor)


def _yarn_attention_factor(scaling: Mapping[str, Any], factor: float) -> float:
    """How much YaRN sharpens attention, from the configuration or by the paper's rule (section 3.4)."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def sharpness(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return sharpness(scaling["mscale"]) / sharpness(scaling["mscale_all_dim"])
    return sharpness(1.0)


def _longrope(plain: Tensor, settings: RopeSettings) -> tuple[Tensor, Tensor, float]:
    """LongRoPE's frequencies for short and for long sequences, and its attention factor."""
    scaling = settings.scaling
    short, long = (
        plain / torch.tensor(scaling[key], dtype=torch.float32, device=plain.device)
        for key in ("short_factor", "long_factor")
    )
    if scaling.get("attention_factor") is not None:
        return short, long, float(scaling["attention_factor"])
    factor = float(scaling.get("factor") or settings.max_length / settings.trained_length)
    sharpness = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(settings.trained_length))
    return short, long, sharpness
