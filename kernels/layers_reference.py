"""The elementwise operations of a decoder layer: plain torch, the reference for `kernels.layers_triton`.

Rounding follows the modelling code of the transformers library: products in the model's own type. Letters: T rows of
the step, F feed-forward size.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh", "relu")


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
