"""Parts of a library model that pruning policies look at: how it rotates, and where its attention leads.

Found by what the modules are, not by the architecture's name; what is not surely known is not said.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.errors import ModelLoadError
from .rope import RopeSettings, rope_settings

_OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "c_proj")


def half_split_rope(model: PreTrainedModel, head_dim: int) -> RopeSettings | None:
    """The model's rotary settings, if its own `rotate_half` pairs dimension i with i + R / 2; else None."""
    rotate = getattr(sys.modules.get(type(model).__module__), "rotate_half", None)
    if rotate is None:
        return None
    row = torch.arange(1.0, 9.0)
    if not torch.equal(rotate(row), torch.cat([-row[4:], row[:4]])):
        return None
    try:
        return rope_settings(model.config.get_text_config(decoder=True).to_dict(), head_dim)
    except (ModelLoadError, TypeError, ValueError):  # a kind, or a form of configuration, that we do not read
        return None


def output_projections(model: PreTrainedModel) -> dict[int, Tensor]:
    """Layer -> weight [hidden, H * D] of the linear layer that its attention ends with, where there is one such."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        layer: Any = getattr(module, "layer_idx", None)
        projections = [child for name, child in module.named_children() if name in _OUTPUT_NAMES]
        if isinstance(layer, int) and len(projections) == 1 and isinstance(projections[0], nn.Linear):
            found[layer] = projections[0].weight
    return found
