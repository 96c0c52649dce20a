"""The elementwise operations of a decoder layer: plain torch, the reference for `kernels.layers_triton`.

Rounding follows the modelling code of the transformers library: norms in float32 and cast before the weight, sums and
products in the model's own type. Letters: T rows of the step, E hidden size, F feed-forward size.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh", "relu")


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual) * weight, x + residual), both [T, E] in x's dtype (Zhang and Sennrich 2019).

    x [T, E]; residual [T, E] or None (then the second result is x itself); weight [E]. Mutates nothing.
    """
    total = x if residual is None else x + residual
    wide = total.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)
    return normed * weight, total


def gated_activation(gate_up: Tensor, activation: Activation) -> Tensor:
    """activation(gate) * up of gate_up [T, 2 F] (gate first): [T, F]. Mutates nothing. `ValueError` for other names."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "silu":
        return F.silu(gate) * up
    if activation == "relu":
        return F.relu(gate) * up
    if activation in ("gelu", "gelu_tanh"):
        return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up
    raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
