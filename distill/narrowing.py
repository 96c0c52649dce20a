"""A draft narrower than its target: which neurons, heads and channels of the kept weights stay.

After Minitron (Muralidharan et al. 2024, section 2): width is cut along the feed-forward's neurons, the attention's
heads and the hidden state's channels; the strongest of each stay. Heads go by key/value head, with its query heads.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.errors import ConfigError
from .importance import channel_importance, gated_mlp, head_projections, input_importance

State = dict[str, Tensor]
"""Tensors of a decoder layer, or of what stands beside the layers, by name."""
_WRITERS = ("o_proj", "down_proj")
"""Linear maps whose outputs are channels; of all others the inputs are."""


@dataclass(frozen=True, slots=True)
class Widths:
    """Of a model's layers."""

    hidden: int
    """Channels of the hidden state."""
    mlp: int | None
    """Neurons of the feed-forward, where the configuration tells."""
    kv_heads: int
    group: int
    """Query heads of each key/value head."""
    head: int
    """Components of a head."""

    @staticmethod
    def of(model: PreTrainedModel) -> "Widths":
        """As the model's configuration has them."""
        text: Any = model.config.get_text_config(decoder=True)
        queries = text.num_attention_heads
        kv = getattr(text, "num_key_value_heads", None) or queries
        head = getattr(text, "head_dim", None) or text.hidden_size // queries
        return Widths(text.hidden_size, getattr(text, "intermediate_size", None), kv, queries // kv, head)


def narrow_config(text: Any, whole: Widths, hidden: int | None, mlp: int | None, kv_heads: int | None) -> None:
    """Set the widths in a decoder's configuration; None leaves one as it is.

    Raises `ConfigError` for one that is not positive, or larger than the target's.
    """
    if mlp is not None:
        if whole.mlp is None or not 0 < mlp <= whole.mlp:
            raise ConfigError(
                f"the draft's feed-forward cannot be {mlp} wide, the target's is {whole.mlp}", param="mlp"
            )
        text.intermediate_size = mlp
    if kv_heads is not None:
        if not 0 < kv_heads <= whole.kv_heads:
            raise ConfigError(
                f"the draft cannot have {kv_heads} key/value heads, the target has {whole.kv_heads}", param="kv_heads"
            )
        text.num_key_value_heads, text.num_attention_heads = kv_heads, kv_heads * whole.group
    if hidden is not None:
        if not 0 < hidden <= whole.hidden:
            raise ConfigError(
                f"the draft's hidden size cannot be {hidden}, the target's is {whole.hidden}", param="hidden"
            )
        text.hidden_size = hidden
    if kv_heads is not None or hidden is not None:
        text.head_dim = whole.head  # else it would be made out of the hidden size


class Narrowing:
    """Takes the weights of a target's layers down to the widths of a draft, by what they do to calibration rows."""

    def __init__(self, target: PreTrainedModel, ours: Widths, rows: Sequence[Tensor]) -> None:
        """rows: ids [1, T]."""
        self._target, self._rows = target, rows
        self._theirs, self._ours = Widths.of(target), ours

    def apply(self, layers: Sequence[nn.Module], states: Sequence[State], beside: State) -> None:
        """Cut the tensors of these layers, a state each, and of what stands `beside` them, in place.

        Raises `ModelLoadError` where the layers have other parts than can be narrowed.
        """
        if self._ours.mlp != self._theirs.mlp:
            self._keep_neurons(layers, states)
        if self._ours.kv_heads != self._theirs.kv_heads:
            self._keep_heads(layers, states)
        if self._ours.hidden != self._theirs.hidden:
            self._keep_channels(layers, states, beside)

    def _keep_neurons(self, layers: Sequence[nn.Module], states: Sequence[State]) -> None:
        """Leave the strongest neurons of each layer's gated feed-forward."""
        assert self._ours.mlp is not None
        found = [gated_mlp(layer) for layer in layers]
        scores = input_importance(self._target, self._rows, [down for _, down in found])
        for state, (name, _), score in zip(states, found, scores, strict=True):
            keep = _strongest(score, self._ours.mlp)
            _select(state, {f"{name}.gate_proj": keep, f"{name}.up_proj": keep}, f"{name}.down_proj", keep)

    def _keep_heads(self, layers: Sequence[nn.Module], states: Sequence[State]) -> None:
        """Leave the strongest key/value heads of each layer, each with its query heads."""
        found = [head_projections(layer) for layer in layers]
        scores = input_importance(self._target, self._rows, [out for _, out in found])
        width, group = self._theirs.head, self._theirs.group
        for state, (name, _), score in zip(states, found, scores, strict=True):
            queries = torch.arange(len(score), device=score.device).view(-1, group * width)
            keep = _strongest(score.view(queries.shape).sum(1), self._ours.kv_heads)
            pairs = torch.arange(len(queries) * width, device=score.device).view(-1, width)[keep].flatten()
            inputs = queries[keep].flatten()
            outputs = {f"{name}.q_proj": inputs, f"{name}.k_proj": pairs, f"{name}.v_proj": pairs}
            _select(state, outputs, f"{name}.o_proj", inputs)

    def _keep_channels(self, layers: Sequence[nn.Module], states: Sequence[State], beside: State) -> None:
        """Leave the strongest channels of the hidden state, the same ones everywhere."""
        keep = _strongest(channel_importance(self._target, self._rows, layers), self._ours.hidden)
        for state in (*states, beside):
            for name, tensor in state.items():
                state[name] = self._channels(name, tensor, keep)

    def _channels(self, name: str, tensor: Tensor, keep: Tensor) -> Tensor:
        module, _, _ = name.rpartition(".")
        module = module.rpartition(".")[2]
        if module in _WRITERS:
            return tensor[keep]
        if tensor.dim() == 2:
            return tensor[:, keep]
        if module == "norm" or module.endswith("layernorm"):
            # The mean square that a norm divides by is now of fewer channels, and that much larger.
            return tensor[keep] * math.sqrt(self._theirs.hidden / self._ours.hidden)
        return tensor  # biases of what reads channels, norms within heads


def _strongest(score: Tensor, count: int) -> Tensor:
    """Indices of the largest entries of a score [N], ascending."""
    return score.topk(count).indices.sort().values


def _select(state: State, outputs: Mapping[str, Tensor], last: str, inputs: Tensor) -> None:
    """Keep these `outputs` of some linear maps in a layer's state, and these `inputs` of the one that they lead to."""
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module in outputs:
            state[name] = tensor[outputs[module]]
        elif module == last and kind == "weight":
            state[name] = tensor[:, inputs]
