"""Beginnings of a draft by name: how deep and how wide, worked out from the target's layers.

Depth goes first: a layer less saves its passes too, a narrower one only bytes. But one layer alone cannot find what
followed the same token before, which takes one to look back by a token and one to look for it (induction heads, Olsson
et al. 2022); so where fewer than two would be left, two stay, with a narrower feed-forward.
"""

from dataclasses import replace
from typing import Literal, get_args

from torch import nn
from transformers import PreTrainedModel

from ..core.errors import ConfigError
from .draft_init import Init
from .importance import decoder_layers, gated_mlp
from .narrowing import Widths

Preset = Literal["tiny", "small"]
SHARES: dict[Preset, float] = {"tiny": 0.1, "small": 0.2}
"""Weights of the draft's layers, by those of the target's: what a step of few sequences takes."""
FEWEST_LAYERS = 2
_NARROWEST = 4
"""The feed-forward stays at least one in so many neurons wide."""
_EVEN = 64
"""Widths are multiples of it where they can, for kernels that compute so many at once."""


def from_preset(init: Init, target: PreTrainedModel) -> Init:
    """What a preset comes to for a target; any other beginning as it is.

    Raises `ConfigError` for a name that is none, `ModelLoadError` where the target has to be narrowed and cannot.
    """
    kind, _, name = init.source.partition(":")
    if kind != "preset":
        return init
    if name not in SHARES:
        raise ConfigError(f"preset must be one of {', '.join(get_args(Preset))}, got {name!r}", param="preset")
    layers = decoder_layers(target)
    wanted = SHARES[name] * len(layers)
    count = min(max(round(wanted), FEWEST_LAYERS), len(layers))
    mlp = _width(target, wanted / count) if wanted < FEWEST_LAYERS else None
    return replace(init, source=f"layers:{count}", mlp=mlp)


def _width(target: PreTrainedModel, share: float) -> int | None:
    """Of a feed-forward whose layer has this share of the weights that it had; None: it stays as it is."""
    layer = decoder_layers(target)[0]
    name, down = gated_mlp(layer)
    whole, inner = _size(layer), _size(layer.get_submodule(name))
    width = Widths.of(target).mlp or down.in_features
    fitting = int((share * whole - (whole - inner)) / inner * width)
    narrow = max(fitting // _EVEN * _EVEN, -(-width // _NARROWEST))
    return narrow if narrow < width else None


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
